"""The ttRPC client: many calls at once over one connection.

Used towards the Kata agent (:mod:`katashim.agent.client`), towards containerd (events) and by tests.
"""

import time

from gevent.hub import Waiter

from katashim import errors, green
from katashim.ttrpc import frame, proto, status
from katashim.ttrpc.connection import WRITE_TIMEOUT_S, Connection
from katashim.ttrpc.stream import Inbox

_MAX_STREAM_ID = 0xFFFFFFFF


class Client:
    """Calls over a connected stream socket.

    :param sock: any kind of socket object; its descriptor is taken over.
    :param name: what the server is, for error texts: "the agent of sandbox x".
    :param on_call: ``on_call(service, method, seconds, code)`` after each call, for logs and metrics.
    :param error_of: makes the exception of an error status: ``error_of(code, service/method, text)``.
    :param write_timeout_s: seconds that the server may leave unread what we send.

    :attr:`closed` is an Event, set when the connection has ended, by whichever side.
    """

    def __init__(self, sock, name, *, on_call=None, error_of=status.error_of,
                 write_timeout_s=WRITE_TIMEOUT_S):
        self.name = name
        self._on_call = on_call
        self._error_of = error_of
        self._streams = {}              # stream id -> _Reply or ClientStream, while it is awaited
        self._next_id = 1
        self._connection = Connection(sock, name, self._on_frame, self._on_lost, write_timeout_s)
        self.closed = self._connection.closed
        self._connection.start()

    def call(self, service, method, request, timeout_s=None, metadata=None):
        """Call a unary method and wait for its response message.

        :param service: full name; :param method: bare name.
        :param request: the request message.
        :param timeout_s: seconds to wait, None = for ever; the server is told too.
        :param metadata: ``{key: value or list of values}``, or None.
        :raises ResourceExhausted: the request is too long; nothing was sent.
        :raises DeadlineExceeded: no answer in time.
        :raises ConnectionClosed: the connection ended first; ``maybe_executed`` tells whether the
            request had left.
        :raises KatashimError: what the server answered, as `error_of` makes it.
        :raises KeyError: there is no such method in our ``.proto`` files.
        """
        cls = proto.service(service)[method].response
        label = f"{service}/{method}"
        body = status.encode_request(service, method, request.SerializeToString(), timeout_s, metadata)
        if self._on_call is None:
            return self._exchange(body, label, cls, timeout_s)
        started, code = time.monotonic(), errors.CANCELLED      # kept if this greenlet is killed
        try:
            response = self._exchange(body, label, cls, timeout_s)
            code = errors.OK
            return response
        except errors.KatashimError as exc:
            code = exc.code
            raise
        finally:
            self._on_call(service, method, time.monotonic() - started, code)

    def stream(self, service, method, request=None, timeout_s=None, metadata=None):
        """Begin a streaming call; returns its :class:`ClientStream`.

        :param request: the request message when only the server streams, else None.
        :param timeout_s: seconds for the whole call, None = no limit; the server is told too.
        :raises: as :meth:`call`.
        """
        info = proto.service(service)[method]
        payload = b"" if request is None else request.SerializeToString()
        body = status.encode_request(service, method, payload, timeout_s, metadata)
        stream_id = self._take_id()
        stream = ClientStream(self, stream_id, info, f"{service}/{method}", timeout_s)
        self._streams[stream_id] = stream
        flags = frame.REMOTE_OPEN if info.client_stream else frame.REMOTE_CLOSED
        try:
            stream.sent_at = self._connection.send(stream_id, frame.REQUEST, body, flags)
        except errors.KatashimError:
            self.forget(stream_id)
            raise
        return stream

    def close(self):
        """Hang up; calls that wait get :class:`errors.ConnectionClosed`."""
        self._connection.close()

    def _exchange(self, body, label, cls, timeout_s):
        # No greenlet switch between taking the id and sending: ids must grow on the wire.
        stream_id = self._take_id()
        reply = self._streams[stream_id] = _Reply(label)
        try:
            reply.sent_at = self._connection.send(stream_id, frame.REQUEST, body)
            with green.deadline(timeout_s, reply.describe):
                item = reply.waiter.get()
        finally:
            self._streams.pop(stream_id, None)
        return self._decode(cls, self._payload_of(item, label), label)

    def _take_id(self):
        stream_id = self._next_id
        if stream_id > _MAX_STREAM_ID:
            self._connection.close("its stream ids are used up")
        self._next_id += 2
        return stream_id

    def _payload_of(self, item, label):
        """The payload of a successful response frame; raises what an unsuccessful one says."""
        if type(item) is frame.Oversize:
            raise errors.ResourceExhausted(
                f"{label}: {self.name} answered: {frame.oversize_text(item.length)}")
        if item.type != frame.RESPONSE:
            raise errors.Internal(f"{label}: {self.name} answered with a frame of type {item.type}")
        response = self._decode(status.Response, item.payload, label)
        if response.status.code != errors.OK:
            raise self._error_of(response.status.code, label, response.status.message)
        return response.payload

    def _decode(self, cls, payload, label):
        try:
            return proto.decode(cls, payload)
        except errors.InvalidArgument as exc:
            raise errors.Internal(f"{label}: {self.name} answered with garbage: {exc}") from exc

    def _on_frame(self, item):
        stream = self._streams.get(item.stream_id)
        if stream is not None:          # else it comes too late: its caller has given up
            stream.on_frame(item)

    def _on_lost(self, error):
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.on_lost(errors.ConnectionClosed(
                f"{stream.label}: {error.message}",
                maybe_executed=self._connection.sent_bytes >= stream.sent_at))

    # For ClientStream.

    def send_data(self, stream_id, payload, flags, timeout_s):
        self._connection.wait_writable(timeout_s)
        self._connection.send(stream_id, frame.DATA, payload, flags)

    def forget(self, stream_id):
        self._streams.pop(stream_id, None)


class _Reply:
    """A unary call that waits."""

    __slots__ = ("label", "sent_at", "waiter")

    def __init__(self, label):
        self.label = label
        self.waiter = Waiter()
        self.sent_at = 0

    def describe(self):
        return f"the answer to {self.label}"

    def on_frame(self, item):
        self.waiter.switch(item)        # frames come in the hub, which is where one may switch

    def on_lost(self, error):
        self.waiter.hub.loop.run_callback(self.waiter.throw, error)


class ClientStream:
    """A streaming call. Also a context manager and an iterable of the server's messages.

    A method whose client alone streams: ``send`` ..., ``close_send``, then ``recv`` its one response.
    """

    def __init__(self, client, stream_id, info, label, timeout_s):
        self.label, self.sent_at = label, 0
        self._client, self._id, self._info = client, stream_id, info
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._inbox = Inbox(f"a message of {label}")
        self._may_send = info.client_stream

    def send(self, message):
        """Send one message; waits while the server is far behind in reading.

        :raises FailedPrecondition: this side has closed the stream, or the server has ended it.
        :raises DeadlineExceeded, ConnectionClosed: as :meth:`recv`.
        """
        self._send(message.SerializeToString(), 0)

    def close_send(self):
        """Say that no more messages will follow."""
        if self._may_send and not self._inbox.ended:
            self._send(b"", frame.REMOTE_CLOSED | frame.NO_DATA)
        self._may_send = False

    def recv(self, timeout_s=None):
        """The server's next message, or None at the end.

        :param timeout_s: seconds to wait for this one, besides the limit of the whole call.
        :raises DeadlineExceeded: it did not come in time. :raises ConnectionClosed: the connection ended.
        :raises KatashimError: what the server ended the stream with.
        """
        payload = self._inbox.take(self._time_left(timeout_s))
        return None if payload is None else self._client._decode(self._info.response, payload, self.label)

    def close(self):
        """Leave the stream; what still comes on it is dropped."""
        try:
            self.close_send()
        except errors.ConnectionClosed:
            pass                        # nobody is left who could be told
        finally:
            self._end()

    def __iter__(self):
        return iter(self.recv, None)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _send(self, payload, flags):
        if not self._may_send:
            raise errors.FailedPrecondition(f"{self.label}: this side of the stream is closed")
        if self._inbox.ended:
            raise errors.FailedPrecondition(f"{self.label}: the server has ended the stream, recv tells why")
        self._client.send_data(self._id, payload, flags, self._time_left())

    def _time_left(self, timeout_s=None):
        if self._deadline is None:
            return timeout_s
        left = max(0.0, self._deadline - time.monotonic())
        return left if timeout_s is None else min(left, timeout_s)

    def _end(self, error=None):
        self._client.forget(self._id)
        if error is not None:
            self._inbox.fail(error)
        else:
            self._inbox.end()

    # For Client.

    def on_frame(self, item):
        if type(item) is frame.Frame and item.type == frame.DATA:
            self._on_data(item)
        else:
            self._on_response(item)

    def _on_data(self, item):
        closes = item.flags & frame.REMOTE_CLOSED
        # Go may put the last message into the closing frame; Rust may close without the NO_DATA flag.
        has_message = item.payload or not (closes or item.flags & frame.NO_DATA)
        room = not has_message or self._inbox.put(item.payload)
        if closes or not room:
            self._end()

    def _on_response(self, item):
        """A response ends every stream: with an error, or with the one answer to a client's stream."""
        try:
            payload = self._client._payload_of(item, self.label)
        except errors.KatashimError as exc:
            self._end(exc)
            return
        if payload or not self._info.server_stream:
            self._inbox.put(payload)
        self._end()

    def on_lost(self, error):
        self._inbox.fail(error)
