"""Protobuf by hand, for the few small messages of the start path.

Importing google.protobuf costs more than all of ``start`` may take. Wire format: each field is a
varint key, number << 3 | type, then a varint (type 0), 8 bytes (1), a length and bytes (2) or
4 bytes (5).
"""

from katashim.errors import InvalidArgument


def read_fields(data):
    """The fields of a message as ``[(number, value)]``: int for a varint, bytes for all else.

    :raises InvalidArgument: `data` is not a protobuf message.
    """
    fields, position = [], 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise InvalidArgument("a protobuf field has number 0")
        if kind == 0:
            value, position = _read_varint(data, position)
        elif kind in (1, 2, 5):
            length, position = _read_varint(data, position) if kind == 2 else (8 if kind == 1 else 4, position)
            value = data[position:position + length]
            position += length
            if position > len(data):
                raise InvalidArgument("a protobuf field is cut short")
        else:
            raise InvalidArgument(f"a protobuf field has type {kind}")
        fields.append((number, value))
    return fields


def text(number, value):
    """A string or message field; nothing when `value` (str or bytes) is empty, as in proto3."""
    raw = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(raw)) + raw if raw else b""


def integer(number, value):
    """A non-negative integer field; nothing when it is 0, as in proto3."""
    return _varint(number << 3) + _varint(value) if value else b""


def timestamp(number, time_ns):
    """A google.protobuf.Timestamp field of `time_ns` nanoseconds since 1970."""
    return text(number, integer(1, time_ns // 1_000_000_000) + integer(2, time_ns % 1_000_000_000))


def _varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data, position):
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise InvalidArgument("a protobuf number is cut short or too long")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
