"""The agent's ttRPC server: unary calls, one thread for each, answers in any order.

Behaves as the Rust server of upstream's agent where servers differ (docs/ttrpc.md): an empty status
in a good answer, 3 for an unknown service, 12 for an unknown method, oversize frames read away and
answered, calls dropped when their caller goes. Frames are katashim.ttrpc.frame's. Called by main.py.
"""

import heapq
import struct
import threading
import time

from katashim.guest import wire
from katashim.guest.agent import log, rpcerror, sockets
from katashim.guest.agent.rpcerror import RpcError
from katashim.guest.agent.workers import Workers
from katashim.ttrpc import frame

_ACCEPT_PAUSE_S = 0.05
_HEADER = struct.Struct(">IIBB")


class Answer:
    """What a handler returns when it matters whether its caller is still there.

    :param response: the message.
    :param settle: called with True when the answer has been sent, or with False when nobody took it: the
        caller went away, or its deadline had passed.
    """

    def __init__(self, response, settle):
        self.response, self.settle = response, settle


class Server:
    """Serves the methods of some services on any number of connections.

    :param codec: a wire.Codec. :param services: ``{service: {method: (request, response)}}`` of type names.
    :param handlers: ``{service: {method: function(request) -> response message, Answer or None}}``. A method
        that is in `services` but not here is answered as unsupported.
    """

    def __init__(self, codec, services, handlers):
        self.codec = codec
        self._methods = {}
        for service, methods in services.items():
            self._methods[service] = {
                name: (codec.type(types[0]) if name in handlers[service] else None,
                       handlers[service].get(name))
                for name, types in methods.items()}
        self._request = codec.type("ttrpc.Request")
        self._workers = Workers()
        self._deadlines = _Deadlines()
        self._connections = set()
        self._closed = threading.Condition()        # guards _connections; notified when one ends

    def serve(self, listener):
        """Accept connections for ever."""
        while True:
            try:
                connection = _Connection(sockets.accept(listener), self)
            except OSError as exc:      # out of files, or the host hung up at once
                log.warning("ttrpc", f"cannot accept a connection: {exc}")
                time.sleep(_ACCEPT_PAUSE_S)
                continue
            with self._closed:
                self._connections.add(connection)
            threading.Thread(target=connection.run, name="connection", daemon=True).start()

    def wait_alone(self, timeout_s):
        """Give the hosts that are connected up to `timeout_s` to read their last answers and hang up."""
        with self._closed:
            self._closed.wait_for(lambda: not self._connections, timeout_s)

    def forget(self, connection):
        """A connection has ended."""
        with self._closed:
            self._connections.discard(connection)
            self._closed.notify_all()

    def submit(self, connection, stream_id, payload):
        """Answer a request; a bad one at once, a good one from a thread."""
        call = _Call(connection, stream_id)
        try:
            request = self.codec.decode(self._request, payload)
            call.name = f"/{request.service}/{request.method}"
            methods = self._methods.get(request.service)
            if methods is None:
                raise RpcError(rpcerror.INVALID_ARGUMENT, f"{request.service} service does not exist")
            if request.method not in methods:
                raise RpcError(rpcerror.UNIMPLEMENTED, f"{request.method} method")
            message_type, handler = methods[request.method]
            if handler is None:
                raise RpcError(rpcerror.NOT_FOUND, f"{call.name} is not supported")
        except wire.WireError as exc:
            call.fail(RpcError(rpcerror.INVALID_ARGUMENT, str(exc)))
        except RpcError as exc:
            call.fail(exc)
        else:
            if request.timeout_nano > 0:
                self._deadlines.add(time.monotonic() + request.timeout_nano / 1e9, call)
            self._workers.submit(self._answer, call, message_type, handler, request.payload)

    def _answer(self, call, message_type, handler, payload):
        start = time.monotonic()
        try:
            response, settle = handler(self.codec.decode(message_type, payload)), None
            if isinstance(response, Answer):
                response, settle = response.response, response.settle
            body = b"" if response is None else self.codec.encode(response)
        except wire.WireError as exc:
            call.fail(RpcError(2, f"ttrpc err: {exc}"))
        except Exception as exc:  # noqa: BLE001  whatever it was, the caller gets an answer
            call.fail(exc)
        else:
            taken = call.succeed(body)
            if settle is not None:
                settle(taken)
        if log.level >= log.DEBUG:
            log.debug("rpc", call.name, milliseconds=round((time.monotonic() - start) * 1000, 1))


class _Call:
    """One request on its way to one answer, whoever gives it first: the handler or the deadline."""

    def __init__(self, connection, stream_id):
        self.name = "?"
        self._connection, self._stream_id = connection, stream_id
        self._open = threading.Lock()

    def succeed(self, body):
        """Answer; returns whether the caller is there and had no answer before."""
        # Response{status: an empty one, payload}
        return self._finish(b"\x0a\x00" + (b"\x12" + wire.varint(len(body)) + body if body else b""))

    def fail(self, error):
        code, text = rpcerror.describe(error)
        log.info("rpc", f"{self.name} failed", code=code, text=text)
        message = text.encode(errors="replace")[:frame.MAX_MESSAGE - 64]
        status = b"\x08" + wire.varint(code) + b"\x12" + wire.varint(len(message)) + message
        self._finish(b"\x0a" + wire.varint(len(status)) + status)

    def expire(self):
        self.fail(RpcError(rpcerror.DEADLINE_EXCEEDED, "timeout"))

    def is_open(self):
        return not self._open.locked()

    def _finish(self, response):
        return self._open.acquire(blocking=False) and self._connection.send(self._stream_id, response)


class _Connection:
    """One host: its requests are read here, answers are written by the threads that have them."""

    def __init__(self, socket, server):
        self._socket, self._server = socket, server
        self._sending = threading.Lock()        # held for a whole frame

    def run(self):
        try:
            while self._read_frame():
                pass
        except OSError as exc:
            log.debug("ttrpc", f"a connection broke: {exc}")
        finally:
            with self._sending:
                self._socket.close()
            self._server.forget(self)

    def send(self, stream_id, payload):
        """Send an answer; returns whether somebody takes it."""
        try:
            data = frame.encode(stream_id, frame.RESPONSE, payload)
        except frame.MessageTooLong as exc:
            text = str(exc).encode()
            status = b"\x08\x03\x12" + wire.varint(len(text)) + text
            data = frame.encode(stream_id, frame.RESPONSE, b"\x0a" + wire.varint(len(status)) + status)
        with self._sending:
            try:
                self._socket.sendall(data)
            except OSError as exc:
                log.debug("ttrpc", f"an answer found nobody: {exc}")
                return False
        return True

    def _read_frame(self):
        """Read one frame and act on it; False at the end of the connection."""
        header = self._read(frame.HEADER_SIZE)
        if header is None:
            return False
        length, stream_id, kind, _ = _HEADER.unpack(header)
        if length > frame.MAX_MESSAGE:
            return self._refuse(stream_id, length)
        payload = self._read(length)
        if payload is None:
            return False
        if kind == frame.REQUEST and stream_id % 2 == 1:
            self._server.submit(self, stream_id, payload)
        elif kind == frame.REQUEST:
            _Call(self, stream_id).fail(RpcError(rpcerror.INVALID_ARGUMENT, "stream id must be odd"))
        elif kind == frame.DATA:
            _Call(self, stream_id).fail(RpcError(rpcerror.INVALID_ARGUMENT, "Stream is no longer active"))
        return True

    def _refuse(self, stream_id, length):
        left = length
        while left:
            piece = self._socket.recv(min(left, 65536))
            if not piece:
                return False
            left -= len(piece)
        _Call(self, stream_id).fail(RpcError(rpcerror.INVALID_ARGUMENT, frame.oversize_text(length)))
        return True

    def _read(self, size):
        """Exactly `size` bytes, or None at the end of the connection."""
        data = self._socket.recv(size) if size else b""
        if len(data) == size:
            return data
        if not data:
            return None
        buffer = bytearray(size)
        view = memoryview(buffer)
        view[:len(data)] = data
        have = len(data)
        while have < size:
            count = self._socket.recv_into(view[have:])
            if count == 0:
                return None
            have += count
        return buffer


class _Deadlines:
    """Answers calls whose time is over. The handler runs on; its answer is then dropped, as upstream does."""

    def __init__(self):
        self._changed = threading.Condition()   # guards _heap and _thread
        self._heap = []
        self._count = 0
        self._thread = None

    def add(self, when, call):
        """Answer `call` with 4 at the time `when` (monotonic) unless it is answered by then."""
        with self._changed:
            self._count += 1
            heapq.heappush(self._heap, (when, self._count, call))
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="deadlines", daemon=True)
                self._thread.start()
            elif self._heap[0][2] is call:
                self._changed.notify()

    def _watch(self):
        while True:
            with self._changed:
                while self._heap and not self._heap[0][2].is_open():
                    heapq.heappop(self._heap)
                left = self._heap[0][0] - time.monotonic() if self._heap else None
                if left is None or left > 0:
                    self._changed.wait(left)
                    continue
                call = heapq.heappop(self._heap)[2]
            call.expire()
