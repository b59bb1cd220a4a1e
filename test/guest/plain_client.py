"""A client for the agent's tests that shares nothing with the agent: google.protobuf and a few lines of
framing.

Each call has a connection of its own, so that calls that wait need no more than a thread.
"""

import socket
import struct

from katashim.ttrpc import proto

_HEADER = struct.Struct(">IIBB")


class Refused(Exception):
    """The agent answered with an error status. :ivar code: gRPC code. :ivar text: its message."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text


class PlainClient:
    """Calls an agent.

    :param address: path of a unix socket. :param port: the guest's vsock port, for a hybrid vsock; None =
    none.
    """

    def __init__(self, address, port=None, service="grpc.AgentService"):
        self._address, self._port, self._service = address, port, service
        self._methods = proto.service(service)

    def connect(self, timeout_s=30):
        """A connected socket. :raises OSError: nobody listens (yet)."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        try:
            connection.connect(self._address)
            if self._port is not None:
                connection.sendall(f"CONNECT {self._port}\n".encode())
                answer = b""
                while not answer.endswith(b"\n"):
                    byte = connection.recv(1)
                    if not byte:
                        raise ConnectionRefusedError(f"the guest does not listen on {self._port}")
                    answer += byte
        except OSError:
            connection.close()
            raise
        return connection

    def call(self, method, timeout_s=30, timeout_nano=0, **fields):
        """Call a method; returns the response message. :raises Refused: an error status came back."""
        with self.connect(timeout_s) as connection:
            return self.exchange(connection, method, timeout_nano=timeout_nano, **fields)

    def exchange(self, connection, method, stream_id=1, timeout_nano=0, **fields):
        """As :meth:`call`, on an open connection."""
        request, response = self._methods[method].request, self._methods[method].response
        self.send(connection, stream_id, method, proto.build(request, **fields).SerializeToString(),
                  timeout_nano)
        return response.FromString(self.receive(connection)[1])

    def send(self, connection, stream_id, method, payload, timeout_nano=0):
        """Send a request frame with any payload."""
        body = proto.get("ttrpc.Request")(service=self._service, method=method, payload=payload,
                                          timeout_nano=timeout_nano).SerializeToString()
        connection.sendall(_HEADER.pack(len(body), stream_id, 1, 0) + body)

    @staticmethod
    def receive(connection):
        """``(stream id, payload)`` of the next response. :raises Refused: it is an error."""
        length, stream_id, _, _ = _HEADER.unpack(_exactly(connection, _HEADER.size))
        response = proto.get("ttrpc.Response").FromString(_exactly(connection, length))
        if response.status.code:
            raise Refused(response.status.code, response.status.message)
        return stream_id, response.payload


def _exactly(connection, size):
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError(f"the agent closed the connection after {len(data)} of {size} bytes")
        data += piece
    return bytes(data)
