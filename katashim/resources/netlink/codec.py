"""Netlink's bytes: message headers, attributes, and the kernel's acknowledgements. No I/O.

Implements netlink(7) and rtnetlink(7): everything is in host byte order and padded to four bytes.
Used by katashim.resources.netlink.connection (framing) and by its siblings (attributes).
"""

import struct
from typing import NamedTuple

from katashim.errors import Internal

NLMSG_ERROR, NLMSG_DONE = 2, 3

NLM_F_REQUEST, NLM_F_MULTI, NLM_F_ACK = 0x01, 0x02, 0x04
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300                      # on a GET
NLM_F_EXCL, NLM_F_CREATE = 0x200, 0x400     # on a NEW
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200     # on an acknowledgement

_NLA_TYPE_MASK = 0x3FFF                 # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_NLA_F_NESTED = 0x8000
_NLMSGERR_ATTR_MSG = 1

_HEADER = struct.Struct("=IHHII")       # length, type, flags, sequence number, port id
_ATTRIBUTE = struct.Struct("=HH")       # length, type
_INT = struct.Struct("=i")
_U32 = struct.Struct("=I")


class Malformed(Internal):
    """What came from the kernel does not follow netlink's rules; a fault of ours or of the kernel."""


class Message(NamedTuple):
    """One netlink message, without its header's length and port."""

    type: int
    flags: int
    sequence: int
    payload: bytes


# -- messages ---------------------------------------------------------------------------------------

def message(kind, flags, sequence, payload):
    """The bytes of one message."""
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, sequence, 0) + payload


def messages(data):
    """Cut one datagram into its messages.

    :returns: list of :class:`Message`. :raises Malformed: a length points outside of the datagram.
    """
    found, position = [], 0
    while len(data) - position >= _HEADER.size:
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, position)
        if length < _HEADER.size or position + length > len(data):
            raise Malformed(f"a netlink message of {length} bytes with {len(data) - position} left")
        found.append(Message(kind, flags, sequence, data[position + _HEADER.size:position + length]))
        position += _aligned(length)
    return found


def acknowledgement(reply):
    """Read an NLMSG_ERROR or NLMSG_DONE message: ``(errno or 0, the kernel's own words or "")``.

    The words come as an extended acknowledgement (``NETLINK_EXT_ACK``, since Linux 4.12).

    :raises Malformed: it is too short.
    """
    if len(reply.payload) < _INT.size:
        if reply.type == NLMSG_DONE:
            return 0, ""                # older kernels end some dumps without a status
        raise Malformed(f"a netlink error of {len(reply.payload)} bytes")
    number = -_INT.unpack_from(reply.payload)[0]
    start = _INT.size
    if reply.type == NLMSG_ERROR:
        start += _echoed(reply)
    words = ""
    if reply.flags & NLM_F_ACK_TLVS:
        words = as_text(dict(attributes(reply.payload, start)).get(_NLMSGERR_ATTR_MSG, b""))
    return number, words


def _echoed(reply):
    """How many bytes of the request an NLMSG_ERROR repeats: its header, and all of it unless capped."""
    if len(reply.payload) < _INT.size + _HEADER.size:
        raise Malformed(f"a netlink error of {len(reply.payload)} bytes")
    if reply.flags & NLM_F_CAPPED:
        return _HEADER.size
    return _aligned(_HEADER.unpack_from(reply.payload, _INT.size)[0])


# -- attributes -------------------------------------------------------------------------------------

def attribute(kind, payload=b""):
    """The bytes of one attribute, padded."""
    head = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind)
    return head + payload + bytes(-len(payload) % 4)


def nested(kind, *inner):
    """An attribute that holds the attributes `inner` (bytes)."""
    return attribute(kind | _NLA_F_NESTED, b"".join(inner))


def u32(kind, value):
    """An attribute that holds an unsigned 32-bit number."""
    return attribute(kind, _U32.pack(value))


def text(kind, value):
    """An attribute that holds a string with its terminating zero."""
    return attribute(kind, value.encode() + b"\0")


def attributes(data, start=0):
    """Cut `data` from `start` on into attributes: list of ``(type, payload bytes)``.

    The flags in the type are taken off. Up to three bytes at the end are passed over, as the kernel
    does itself.

    :raises Malformed: a length points outside of `data`.
    """
    found, position = [], start
    while len(data) - position >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < _ATTRIBUTE.size or position + length > len(data):
            raise Malformed(f"a netlink attribute of {length} bytes with {len(data) - position} left")
        found.append((kind & _NLA_TYPE_MASK, data[position + _ATTRIBUTE.size:position + length]))
        position += _aligned(length)
    return found


def as_u32(payload):
    """The number in an attribute's payload. :raises Malformed: it does not have four bytes."""
    if len(payload) != _U32.size:
        raise Malformed(f"a netlink number of {len(payload)} bytes")
    return _U32.unpack(payload)[0]


def as_text(payload):
    """The string in an attribute's payload, up to its zero."""
    return payload.partition(b"\0")[0].decode("utf-8", "replace")


def unpack(structure, data, what):
    """The fixed part of a message, by a ``struct.Struct``.

    :raises Malformed: `data` is shorter than that; `what` names the message.
    """
    if len(data) < structure.size:
        raise Malformed(f"{what} of {len(data)} bytes, {structure.size} at least were expected")
    return structure.unpack_from(data)


def _aligned(length):
    return length + (-length % 4)
