"""Protobuf's wire format, driven by tables: all that the agent in the guest needs of it.

The host uses google.protobuf; the guest has no room for it (start-up time counts there), so its
messages are plain Python objects, described by the tables that tables.py makes out of the same
descriptors. Implements the encoding of protobuf.dev/programming-guides/encoding for proto3, without
groups and floating point, which no message of the agent has. Standard library only.

    codec = Codec(fields)
    Storage = codec.type("grpc.Storage")
    storage = Storage(driver="blk", options=["ro"])
    storage.mount_point             # "": what is absent reads as its default, an absent message as None
    codec.encode(storage)           # bytes
    codec.decode(Storage, data)

A table is ``{message: ((number, name, kind, repeated, detail), ...)}``: kind is one of the scalar
names of proto3, ``message`` (detail: its name) or ``map`` (detail: kind and detail of key and value);
an optional scalar has ``optional`` as its detail.
"""

MAX_DEPTH = 64

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MASK64 = (1 << 64) - 1
_INTEGERS = {"int32": (32, True), "int64": (64, True), "uint32": (32, False), "uint64": (64, False),
             "enum": (32, True)}
_DEFAULTS = {"string": "", "bytes": b"", "bool": False, **dict.fromkeys(_INTEGERS, 0)}


class WireError(ValueError):
    """The bytes are not the message that they should be."""


class Message:
    """The base of all messages; see the module's text. Made by :meth:`Codec.type` only."""

    NAME = ""
    FIELDS = ()         # in the order of their numbers
    BY_NUMBER, DEFAULTS = {}, {}

    def __init__(self, **fields):
        for name in fields:
            if name not in self.DEFAULTS:
                raise TypeError(f"{self.NAME} has no field {name!r}")
        self.__dict__.update(fields)

    def __getattr__(self, name):        # only for what is not there
        try:
            return self.DEFAULTS[name]
        except KeyError:
            raise AttributeError(f"{self.NAME} has no field {name!r}") from None

    def __eq__(self, other):
        return type(self) is type(other) and all(
            getattr(self, field.name) == getattr(other, field.name)
            or field.repeated and list(getattr(self, field.name)) == list(getattr(other, field.name))
            for field in self.FIELDS)

    __hash__ = None

    def __repr__(self):
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{self.NAME}({fields})"


class Field:
    """One field of a message.

    :ivar default: what an absent one reads as: an empty tuple for a repeated one, {} for a map.
    """

    __slots__ = ("default", "detail", "kind", "name", "number", "repeated", "tag")

    def __init__(self, number, name, kind, repeated, detail):
        self.number, self.name, self.kind, self.repeated, self.detail = number, name, kind, repeated, detail
        if repeated:
            self.default = ()
        elif kind == "map":
            self.default = {}
        elif kind == "message" or detail == "optional":
            self.default = None
        else:
            self.default = _DEFAULTS[kind]
        delimited = kind in ("string", "bytes", "message", "map") or repeated
        self.tag = varint(number << 3 | (_BYTES if delimited else _VARINT))

    def single(self):
        """This field as if it were not repeated."""
        return Field(self.number, self.name, self.kind, False, self.detail)


class Codec:
    """Message types by name, made when they are first asked for, and their two directions.

    :param tables: what tables.py made.
    """

    def __init__(self, tables):
        self._tables = tables
        self._types = {}

    def type(self, name):
        """The class of the message called `name` (full name). :raises KeyError: not in the tables."""
        made = self._types.get(name)
        if made is None:
            fields = tuple(Field(*row) for row in self._tables[name])
            made = self._types[name] = type(name.rpartition(".")[2], (Message,), {
                "NAME": name, "FIELDS": fields, "BY_NUMBER": {field.number: field for field in fields},
                "DEFAULTS": {field.name: field.default for field in fields}})
        return made

    def encode(self, message):
        """`message` as bytes. :raises TypeError, ValueError: a field holds what it cannot."""
        parts = []
        self._encode(message, parts)
        return b"".join(parts)

    def decode(self, cls, data):
        """The message of type `cls` in `data` (bytes-like). Unknown fields are skipped.

        :raises WireError: the bytes are not such a message.
        """
        message = cls()
        try:
            self._decode(message, memoryview(data), 0)
        except IndexError as exc:
            raise WireError(f"{cls.NAME} is cut short") from exc
        return message

    # -- encoding ---------------------------------------------------------------------------------
    def _encode(self, message, parts):
        present = message.__dict__
        for field in message.FIELDS:
            if field.name not in present:
                continue
            value = present[field.name]
            if value is None:
                continue
            if field.kind == "map":
                self._encode_map(field, value, parts)
            elif field.repeated:
                self._encode_repeated(field, value, parts)
            elif value != field.default or field.detail == "optional":
                self._encode_one(field, value, parts)

    def _encode_one(self, field, value, parts):
        parts.append(field.tag)
        parts.append(self._scalar(field.kind, value))

    def _encode_repeated(self, field, values, parts):
        if field.kind in ("string", "bytes", "message"):
            for value in values:
                self._encode_one(field, value, parts)
        elif values:
            parts.append(field.tag)
            parts.append(_delimited(b"".join(self._scalar(field.kind, value) for value in values)))

    def _encode_map(self, field, mapping, parts):
        for pair in mapping.items():
            entry = []
            for number, (kind, _), value in zip((1, 2), field.detail, pair):
                delimited = kind in ("string", "bytes", "message")
                entry.append(varint(number << 3 | (_BYTES if delimited else _VARINT)))
                entry.append(self._scalar(kind, value))
            parts.append(field.tag)
            parts.append(_delimited(b"".join(entry)))

    def _scalar(self, kind, value):
        """A value with its length before it, but without a tag."""
        if kind == "message":
            return _delimited(self.encode(value))
        if kind == "string":
            return _delimited(value.encode())
        if kind == "bytes":
            return _delimited(bytes(value))
        if kind == "bool":
            return b"\1" if value else b"\0"
        bits, signed = _INTEGERS[kind]
        low, high = (-1 << bits - 1, 1 << bits - 1) if signed else (0, 1 << bits)
        if not low <= value < high:
            raise ValueError(f"{value} does not fit {kind}")
        return varint(value & _MASK64)

    # -- decoding ---------------------------------------------------------------------------------
    def _decode(self, message, data, depth):
        if depth > MAX_DEPTH:
            raise WireError(f"{message.NAME} is nested too deep")
        values, fields = message.__dict__, message.BY_NUMBER
        position, end = 0, len(data)
        while position < end:
            tag, position = read_varint(data, position)
            field, wire = fields.get(tag >> 3), tag & 7
            start, position = _extent(data, position, end, wire)
            if tag >> 3 == 0:
                raise WireError(f"{message.NAME} has a field 0")
            if field is not None:
                self._take(values, field, wire, data, start, position, depth)

    def _take(self, values, field, wire, data, start, end, depth):
        """Put one occurrence of `field`, whose value is ``data[start:end]``, into `values`."""
        kind = field.kind
        delimited = kind in ("string", "bytes", "message", "map")
        if delimited != (wire == _BYTES) and not (field.repeated and wire == _BYTES) or wire in (
                _FIXED32, _FIXED64):
            return      # another wire type than ours is an unknown field
        if kind == "map":
            key, value = self._entry(field, data[start:end], depth)
            values.setdefault(field.name, {})[key] = value
        elif kind == "message" and not field.repeated:
            inner = values.get(field.name)
            if inner is None:
                inner = values[field.name] = self.type(field.detail)()
            self._decode(inner, data[start:end], depth + 1)
        elif not field.repeated:
            values[field.name] = self._value(field, data, start, end, depth)
        elif delimited or wire == _VARINT:
            values.setdefault(field.name, []).append(self._value(field, data, start, end, depth))
        else:
            packed = values.setdefault(field.name, [])
            while start < end:
                packed.append(self._value(field, data[:end], start, end, depth))
                _, start = read_varint(data, start)

    def _value(self, field, data, start, end, depth):
        kind = field.kind
        if kind == "message":
            inner = self.type(field.detail)()
            self._decode(inner, data[start:end], depth + 1)
            return inner
        if kind == "string":
            try:
                return str(data[start:end], "utf-8")
            except UnicodeDecodeError as exc:
                raise WireError(f"{field.name} is not UTF-8") from exc
        if kind == "bytes":
            return bytes(data[start:end])
        number, _ = read_varint(data, start)
        if kind == "bool":
            return number != 0
        bits, signed = _INTEGERS[kind]
        number &= (1 << bits) - 1
        return number - (1 << bits) if signed and number >> bits - 1 else number

    def _entry(self, field, data, depth):
        (key_kind, _), (value_kind, value_detail) = field.detail
        found = {1: _DEFAULTS[key_kind], 2: _DEFAULTS.get(value_kind)}
        columns = {1: Field(1, field.name, key_kind, False, None),
                   2: Field(2, field.name, value_kind, False, value_detail)}
        position, end = 0, len(data)
        while position < end:
            tag, position = read_varint(data, position)
            start, position = _extent(data, position, end, tag & 7)
            column = columns.get(tag >> 3)
            if column is not None:
                found[tag >> 3] = self._value(column, data, start, position, depth + 1)
        if found[2] is None:
            found[2] = self.type(value_detail)()
        return found[1], found[2]


def varint(number):
    """A number from 0 to 2**64 - 1 as protobuf writes it."""
    if number < 0x80:
        return bytes((number,))
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def read_varint(data, position):
    """``(number, position after it)``. :raises IndexError: `data` ends within. :raises WireError: too
    long."""
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    number, shift = byte & 0x7F, 7
    while True:
        position += 1
        byte = data[position]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & _MASK64, position + 1
        shift += 7
        if shift > 63:
            raise WireError("a number of more than ten bytes")


def _delimited(data):
    return varint(len(data)) + data


def _extent(data, position, end, wire):
    """``(start of the value, position after the field)`` of a field of wire type `wire`."""
    if wire == _VARINT:
        _, after = read_varint(data, position)
        return position, after
    if wire == _BYTES:
        length, position = read_varint(data, position)
    elif wire == _FIXED64:
        length = 8
    elif wire == _FIXED32:
        length = 4
    else:
        raise WireError(f"wire type {wire} does not exist in proto3")
    if position + length > end:
        raise WireError("a field reaches beyond its message")
    return position, position + length
