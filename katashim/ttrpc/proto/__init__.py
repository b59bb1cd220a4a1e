"""Protobuf messages and services, from our own ``.proto`` files; nothing else imports google.protobuf.

The files stand beside this one and are compiled into ``descriptors.binpb`` (see ``compile.py``),
which is loaded into a descriptor pool of its own: no clash with a ``types`` module or with another
user of protobuf in the process, and any protobuf from 4.25 to 7.x will do. Message classes are made
when they are first asked for.

    State = proto.get("containerd.task.v2.StateRequest")
    request = State(id="c1")
    proto.service("grpc.AgentService")["WaitProcess"].response

Used by every module that puts a message on a wire; plain (works with and without gevent).
"""

import os
from typing import NamedTuple

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from katashim.errors import InvalidArgument

_BLOB = os.path.join(os.path.dirname(__file__), "descriptors.binpb")


class Method(NamedTuple):
    """One RPC of a service, with the message classes that it takes and gives."""

    name: str
    request: type
    response: type
    client_stream: bool
    server_stream: bool


def get(full_name):
    """The message class called `full_name`, such as ``grpc.Storage``.

    :raises KeyError: no such message in our ``.proto`` files.
    """
    cls = _classes.get(full_name)
    if cls is None:
        cls = _classes[full_name] = GetMessageClass(_pool.FindMessageTypeByName(full_name))
    return cls


def service(full_name):
    """The methods of a service by name: ``{method name: Method}``.

    :raises KeyError: no such service in our ``.proto`` files.
    """
    methods = _services.get(full_name)
    if methods is None:
        descriptor = _pool.FindServiceByName(full_name)
        methods = _services[full_name] = {method.name: _method(method) for method in descriptor.methods}
    return methods


def build(cls, /, **fields):
    """Make a message of `cls` out of plain values.

    A message field takes a dict, a NamedTuple with the message's field names, or a message; a
    repeated one any list or tuple of those. None means absent.

    :raises ValueError, TypeError: a field the message does not have, or a value that does not fit it.
    """
    message = cls()
    _fill(message, fields)
    return message


def decode(cls, data):
    """Parse `data` (bytes) as a `cls`.

    :raises InvalidArgument: it is not one.
    """
    try:
        return cls.FromString(data)
    except DecodeError as exc:
        raise InvalidArgument(f"{len(data)} bytes are no {cls.DESCRIPTOR.full_name}: {exc}") from exc


def pack_any(message):
    """Wrap `message` in an Any under its bare full name, as containerd's typeurl package does."""
    return get("google.protobuf.Any")(
        type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def unpack_any(any_message):
    """The message inside an Any; what stands before a slash in the type URL does not matter.

    :raises InvalidArgument: a type that we do not know, or a body that is not of that type.
    """
    name = any_message.type_url.rpartition("/")[2]
    try:
        cls = get(name)
    except KeyError as exc:
        raise InvalidArgument(f"a message of unknown type {any_message.type_url!r}") from exc
    return decode(cls, any_message.value)


def timestamp(time_ns):
    """A ``google.protobuf.Timestamp`` of `time_ns` (nanoseconds since 1970, as ``time.time_ns()``)."""
    seconds, nanos = divmod(time_ns, 1_000_000_000)
    return get("google.protobuf.Timestamp")(seconds=seconds, nanos=nanos)


def time_ns(stamp):
    """The opposite of :func:`timestamp`."""
    return stamp.seconds * 1_000_000_000 + stamp.nanos


def _method(descriptor):
    return Method(descriptor.name,
                  get(descriptor.input_type.full_name), get(descriptor.output_type.full_name),
                  descriptor.client_streaming, descriptor.server_streaming)


def _fill(message, fields):
    descriptors = message.DESCRIPTOR.fields_by_name
    for name, value in fields.items():
        if value is None:
            continue
        field = descriptors.get(name)
        if field is None:
            raise ValueError(f"{message.DESCRIPTOR.full_name} has no field {name!r}")
        target = getattr(message, name)
        if isinstance(target, Message):
            target.SetInParent()        # present, even when the record holds only defaults
            _fill_message(target, value)
        elif hasattr(target, "GetEntryClass"):
            _fill_map(target, value)
        elif field.message_type is not None:
            for item in value:
                _fill_message(target.add(), item)
        elif hasattr(target, "extend"):
            target.extend(value)
        else:
            setattr(message, name, value)


def _fill_message(message, value):
    if isinstance(value, Message):
        message.CopyFrom(value)
    elif isinstance(value, dict):
        _fill(message, value)
    elif hasattr(value, "_asdict"):
        _fill(message, value._asdict())
    else:
        raise TypeError(f"a {message.DESCRIPTOR.full_name} cannot be made of {value!r}")


def _fill_map(target, value):
    if target.GetEntryClass().DESCRIPTOR.fields_by_name["value"].message_type is None:
        target.update(value)
    else:
        for key, item in value.items():
            _fill_message(target[key], item)


def _load_pool():
    """Read the blob into a pool. A FileDescriptorSet is a row of (tag 0x0a, length, file): cutting it
    up here saves the import of protobuf's own descriptor messages."""
    pool = DescriptorPool()
    with open(_BLOB, "rb") as blob:
        data = blob.read()
    position = 0
    while position < len(data):
        length, position = _varint(data, position + 1)
        pool.AddSerializedFile(data[position:position + length])
        position += length
    return pool


def _varint(data, position):
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


_classes = {}
_services = {}
_pool = _load_pool()
