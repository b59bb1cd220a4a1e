"""The other end of a ttRPC connection, as bare frames: for tests of what our client and server say."""

import gevent
from gevent.socket import socketpair

from katashim.ttrpc import frame, proto, status

TIMEOUT_S = 5


class RawPeer:
    """Sends and reads frames over a socket of gevent's, each wait bounded."""

    def __init__(self, sock):
        self.sock = sock
        self._decoder = frame.Decoder()
        self._frames = []

    def send(self, stream_id, type, payload=b"", flags=0):
        self.sock.sendall(frame.encode(stream_id, type, payload, flags))

    def request(self, stream_id, service, method, message=None, flags=0, **envelope):
        """Send a request; `envelope`: timeout_s and metadata."""
        payload = b"" if message is None else message.SerializeToString()
        envelope = status.encode_request(service, method, payload, **envelope)
        self.send(stream_id, frame.REQUEST, envelope, flags)

    def recv(self):
        """The next frame."""
        with gevent.Timeout(TIMEOUT_S, AssertionError("no frame came")):
            while not self._frames:
                data = self.sock.recv(1 << 16)
                if not data:
                    raise EOFError("the connection ended")
                self._frames.extend(self._decoder.feed(data))
        return self._frames.pop(0)

    def recv_status(self):
        """The next frame, which is a response: ``(stream id, code, text, payload)``."""
        item = self.recv()
        assert item.type == frame.RESPONSE and item.flags == 0
        response = proto.decode(status.Response, item.payload)
        return item.stream_id, response.status.code, response.status.message, response.payload

    def at_end(self):
        """True when the other side hangs up next; a frame in its place is an error."""
        try:
            item = self.recv()
        except (EOFError, ConnectionResetError):
            return True
        raise AssertionError(f"expected the end, got {item}")

    def close(self):
        self.sock.close()


def pair():
    """``(plain end for the side under test, RawPeer)``."""
    ours, theirs = socketpair()
    return ours, RawPeer(theirs)
