"""ttRPC's frames, without any input or output: bytes in, frames out, and the reverse.

A frame is a header of ten bytes and a payload (containerd/ttrpc, PROTOCOL.md):

    0..3  length of the payload, big endian, at most 4 MiB
    4..7  stream id, big endian; odd when the client opened the stream
    8     type: 1 request, 2 response, 3 data
    9     flags: 1 remote closed, 2 remote open, 4 no data

Only the standard library is needed here, because the agent inside the guest reads its wire with
this module too. The host's :mod:`katashim.ttrpc.connection` is the other caller.
"""

import struct
from collections import namedtuple  # in the guest, loading `typing` would take 80 ms of each VM's start

MAX_MESSAGE = 4 << 20           # bytes of payload; both reference implementations have this limit
HEADER_SIZE = 10

# Types.
REQUEST, RESPONSE, DATA = 1, 2, 3

# Flags.
REMOTE_CLOSED = 0x1             # the sender of this frame will send nothing more on the stream
REMOTE_OPEN = 0x2               # data frames of the sender will follow
NO_DATA = 0x4                   # there is no message here; without it an empty payload is a message

_header = struct.Struct(">IIBB")


Frame = namedtuple("Frame", "stream_id type flags payload")

# A frame over the limit came in; its payload was read and thrown away. `length` is what its header said.
Oversize = namedtuple("Oversize", "stream_id type flags length")


class MessageTooLong(ValueError):
    """A payload that must not be sent, because the other side would refuse it."""


def encode(stream_id, type, payload=b"", flags=0):
    """One frame as bytes.

    :raises MessageTooLong: `payload` is over :data:`MAX_MESSAGE`.
    """
    if len(payload) > MAX_MESSAGE:
        raise MessageTooLong(oversize_text(len(payload)))
    return _header.pack(len(payload), stream_id, type, flags) + payload


def oversize_text(length):
    """How both reference implementations complain of a message of `length` bytes."""
    return f"message length {length} exceed maximum message size of {MAX_MESSAGE}"


class Decoder:
    """Cuts a stream of bytes into frames, however the bytes are split.

    An oversize frame does not end the stream: its payload is skipped as it comes in and an
    :class:`Oversize` stands in its place. No bytes can make the decoder fail.
    """

    def __init__(self):
        self._kept = []         # pieces of the frame that is not complete yet
        self._have = 0          # their length in bytes
        self._need = HEADER_SIZE    # bytes that must be there before it is worth looking again
        self._skipping = None   # the Oversize whose payload is being thrown away
        self._skip = 0          # bytes of it still to come

    def feed(self, data):
        """Take in `data` (bytes-like, copied) and return the frames that are now complete, in order."""
        data = memoryview(data)
        if self._skipping is None and self._have + len(data) < self._need:
            self._keep(data)
            return []
        if self._kept:
            self._kept.append(data)
            data = memoryview(b"".join(self._kept))
            self._kept.clear()
            self._have = 0
        frames = []
        position = self._cut(data, frames)
        self._keep(data[position:])
        return frames

    @property
    def in_frame(self):
        """True when the stream ends in the middle of a frame if it ends now."""
        return self._have > 0 or self._skipping is not None

    def _keep(self, data):
        if data:
            self._kept.append(bytes(data))
            self._have += len(data)

    def _cut(self, data, frames):
        """Append the complete frames of `data` to `frames`; returns how many bytes they took."""
        position, end = 0, len(data)
        while True:
            if self._skipping is not None:
                position = self._skip_payload(position, end, frames)
            body = position + HEADER_SIZE
            if body > end:
                self._need = HEADER_SIZE
                return position
            length, stream_id, type, flags = _header.unpack_from(data, position)
            if length > MAX_MESSAGE:
                self._skipping, self._skip = Oversize(stream_id, type, flags, length), length
                position = body
            elif body + length > end:
                self._need = HEADER_SIZE + length
                return position
            else:
                position = body + length
                frames.append(Frame(stream_id, type, flags, bytes(data[body:position])))

    def _skip_payload(self, position, end, frames):
        gone = min(self._skip, end - position)
        self._skip -= gone
        if self._skip == 0:
            frames.append(self._skipping)
            self._skipping = None
        return position + gone
