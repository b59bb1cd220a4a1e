"""The ttRPC server: containerd's requests to the shim, and anything else that is served here.

Each request runs in a greenlet of a recycling pool; reading goes on meanwhile, so a handler may take
as long as it likes (``Task.Wait`` takes as long as the container lives). What the server answers in
each odd situation is what containerd's Go implementation answers (docs/ttrpc.md has the table).
"""

import logging
import time

import gevent
from gevent import get_hub
from gevent.event import Event
from gevent.socket import socket as gevent_socket

from katashim import errors, green
from katashim.ttrpc import frame, proto, status
from katashim.ttrpc.connection import WRITE_TIMEOUT_S, Connection
from katashim.ttrpc.stream import Inbox

log = logging.getLogger(__name__)

_ACCEPT_RETRY_S = 0.1
_LATE_IDS = 1024        # stream ids skipped by the client that may still come


class Context:
    """What a handler may want to know about its call."""

    __slots__ = ("deadline", "metadata", "method", "peer_closed", "service", "stream")

    def __init__(self, service, method, metadata, deadline, peer_closed):
        self.service, self.method = service, method
        self.metadata = metadata            # {lower-case key: [values]}
        self.deadline = deadline            # time.monotonic() at which the client gives up, or None
        self.peer_closed = peer_closed      # Event: the client has gone away
        self.stream = None                  # of a client-streaming method: its RequestStream

    def time_left(self):
        """Seconds until the client gives up, or None when it waits for ever."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


class RequestStream:
    """The messages that a client streams to a handler; iterate, or :meth:`recv` one by one."""

    def __init__(self, cls, inbox):
        self._cls, self._inbox = cls, inbox

    def recv(self, timeout_s=None):
        """The next message, or None once the client has said all.

        :raises DeadlineExceeded: nothing came within `timeout_s` seconds.
        """
        payload = self._inbox.take(timeout_s)
        return None if payload is None else proto.decode(self._cls, payload)

    def __iter__(self):
        return iter(self.recv, None)


class Server:
    """Serve `services` on `listener`.

    :param listener: a listening stream socket; its descriptor is taken over.
    :param services: ``{full service name: handler}``. A handler has one method for each RPC,
        ``def State(self, request, context)``, which returns the response message (None for an empty
        one), or, when the method streams its answer, an iterable of messages. When the client
        streams, `request` is None and ``context.stream`` has its messages. An exception becomes an
        error status by :func:`katashim.errors.status_of`.
    :param workers: the :class:`katashim.green.WorkerPool` that handlers run on; our own by default.
    :param name: who the clients are, for the log: "containerd".
    :param on_call: ``on_call(service, method, seconds, code)`` after each call, for logs and metrics.

    :attr:`idle` is an Event, set while no client is connected: since :attr:`idle_since` (time.monotonic()).

    When a client goes away or its deadline passes, its handlers get :class:`errors.Cancelled` or
    :class:`errors.DeadlineExceeded` raised at the point where they wait.
    """

    def __init__(self, listener, services, workers=None, *, name="client", on_call=None,
                 write_timeout_s=WRITE_TIMEOUT_S):
        self.name = name
        self.on_call = on_call
        self.workers = workers or green.WorkerPool("ttrpc")
        self.write_timeout_s = write_timeout_s
        self._routes = {service: _routes(service, handler) for service, handler in services.items()}
        self._listener = gevent_socket(fileno=listener.detach())
        self._acceptor = None
        self._sessions = set()
        self.idle = Event()
        self.idle.set()
        self.idle_since = time.monotonic()

    def start(self):
        """Begin to accept clients."""
        self._acceptor = green.spawn(f"ttrpc server for {self.name}", self._accept)

    def stop(self, grace_s=0):
        """Accept no more clients, give the calls that run `grace_s` seconds to end, then hang up.

        Not to be called with a grace from a handler of this server: it would wait for itself.
        """
        if self._acceptor is not None:
            self._acceptor.kill()
        self._listener.close()
        watch = green.Stopwatch(grace_s)
        for session in list(self._sessions):
            session.finish(watch.left())
        for session in list(self._sessions):
            session.close()

    def route(self, service, method):
        """The ``(Method, handler function)`` that serves a call.

        :raises Unsupported: there is none.
        """
        methods = self._routes.get(service)
        if methods is None:
            raise errors.Unsupported(f"service {service}")
        method_and_handler = methods.get(method)
        if method_and_handler is None:
            raise errors.Unsupported(f"method {method}")
        return method_and_handler

    def forget(self, session):
        """A client has gone."""
        self._sessions.discard(session)
        if not self._sessions:
            self.idle_since = time.monotonic()
            self.idle.set()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError as exc:      # out of descriptors, or the client was gone before we looked
                log.warning("accepting a connection of %s failed: %s", self.name, exc)
                gevent.sleep(_ACCEPT_RETRY_S)
                continue
            self.idle.clear()
            self._sessions.add(_Session(self, client))


def _routes(service, handler):
    """``{method name: (Method, function)}`` of what `handler` implements of `service`."""
    return {name: (method, getattr(handler, name)) for name, method in proto.service(service).items()
            if hasattr(handler, name)}


class _Call:
    """A request that is being handled."""

    __slots__ = ("code", "context", "handler", "inbox", "job", "method", "payload", "stream_id", "timer")

    def __init__(self, stream_id, method, handler, payload, context):
        self.stream_id, self.method, self.handler = stream_id, method, handler
        self.payload, self.context = payload, context
        self.inbox = self.job = self.timer = None
        self.code = errors.OK           # what was answered

    def close(self, code):
        """It is answered with `code`, or never will be."""
        self.code = code
        if self.inbox is not None:
            self.inbox.end()
        if self.timer is not None:
            self.timer.close()


class _Session:
    """One client and its calls."""

    def __init__(self, server, sock):
        self._server = server
        self._calls = {}                # stream id -> _Call, until it is answered
        self._running = 0               # handlers, answered or not
        self._quiet = Event()           # none runs
        self._quiet.set()
        self._last_id = -1
        self._skipped_ids = set()
        self._peer_closed = Event()
        self._connection = Connection(sock, server.name, self._on_frame, self._on_lost,
                                      server.write_timeout_s)
        self._connection.start()

    def finish(self, timeout_s):
        """Let the calls that run come to their end, for at most `timeout_s` seconds."""
        watch = green.Stopwatch(timeout_s)
        if self._quiet.wait(watch.left()):
            try:
                self._connection.flush(watch.left())
            except errors.DeadlineExceeded as exc:
                log.warning("stopping all the same: %s", exc)
        elif timeout_s:
            running = ", ".join(call.context.method for call in self._calls.values())
            log.warning("stopping while calls of %s still run: %s", self._server.name, running)

    def close(self):
        self._connection.close()

    # From here on to _start: in the loop's callback, nothing may wait.

    def _on_frame(self, item):
        if type(item) is frame.Oversize:
            self._on_oversize(item)
        elif item.type == frame.REQUEST:
            self._on_request(item)
        elif item.type == frame.DATA:
            self._on_data(item)
        else:                           # a type of the future, or a response: not for a server
            log.debug("%s sent a frame of type %d, ignored", self._server.name, item.type)

    def _on_oversize(self, item):
        if item.type == frame.REQUEST:
            self._claim(item.stream_id)
        if item.type in (frame.REQUEST, frame.DATA):
            self._break_off(item.stream_id, errors.ResourceExhausted(frame.oversize_text(item.length)))

    def _on_request(self, item):
        try:
            if not item.stream_id & 1:
                raise errors.InvalidArgument("stream id must be odd for client initiated streams")
            if not self._claim(item.stream_id):
                raise errors.InvalidArgument("stream id cannot be re-used and must increment")
            request = proto.decode(status.Request, item.payload)
            self._start(item, request, *self._server.route(request.service, request.method))
        except errors.KatashimError as exc:
            self._send_error(item.stream_id, exc)

    def _claim(self, stream_id):
        """May a request have this id? Each id serves once, and ids grow.

        The Rust client numbers its requests before it queues them, so two of them can swap places
        on the wire: an id that was jumped over a little while ago is good too.
        """
        if stream_id > self._last_id:
            oldest = max(self._last_id + 2, stream_id - 2 * _LATE_IDS)
            if oldest < stream_id:
                if len(self._skipped_ids) > _LATE_IDS:
                    self._skipped_ids.clear()
                self._skipped_ids.update(range(oldest, stream_id, 2))
            self._last_id = stream_id
            return True
        if stream_id in self._skipped_ids:
            self._skipped_ids.remove(stream_id)
            return True
        return False

    def _on_data(self, item):
        call = self._calls.get(item.stream_id)
        if call is None or call.inbox is None or call.inbox.ended:
            self._break_off(item.stream_id, errors.InvalidArgument("stream id is no longer active"))
            return
        closes = item.flags & frame.REMOTE_CLOSED
        if closes and item.payload:
            self._break_off(item.stream_id,
                            errors.InvalidArgument("a data frame that closes must not carry data"))
            return
        if not closes and not item.flags & frame.NO_DATA and not call.inbox.put(item.payload):
            self._break_off(item.stream_id, errors.ResourceExhausted("stream buffer full"))
        elif closes:
            call.inbox.end()

    def _on_lost(self, error):
        self._peer_closed.set()
        self._server.forget(self)
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.close(errors.CANCELLED)
            call.job.cancel(errors.Cancelled(f"{call.context.method} is cancelled: {error.message}"))

    def _on_deadline(self, stream_id):
        call = self._calls[stream_id]
        self._break_off(stream_id, errors.DeadlineExceeded(
            f"{call.context.service}/{call.context.method} took longer than its caller was willing to wait"))

    def _break_off(self, stream_id, error):
        """Answer `error` on a stream, whether a call runs there or not; if so, stop it."""
        call = self._calls.get(stream_id)
        if call is not None:
            self._close_call(call, error.code)
            call.job.cancel(error)
        self._send_error(stream_id, error)

    def _send_error(self, stream_id, error):
        """Answer an error that did not come out of a handler."""
        code, text = errors.status_of(error)
        self._send(stream_id, frame.RESPONSE, status.encode_error(code, text))

    def _send(self, *parts):
        try:
            self._connection.send(*parts)
        except errors.ConnectionClosed as exc:
            log.debug("an answer came too late: %s", exc)

    def _start(self, item, request, method, handler):
        timeout_nano, deadline = request.timeout_nano, None
        if timeout_nano < 0:            # Go sends what is left, even when nothing is
            raise errors.DeadlineExceeded("the caller's deadline had passed before the request came in")
        if timeout_nano:
            deadline = time.monotonic() + timeout_nano / 1e9
        metadata = status.metadata_of(request) if request.metadata else {}
        context = Context(request.service, request.method, metadata, deadline, self._peer_closed)
        call = _Call(item.stream_id, method, handler, request.payload, context)
        if method.client_stream:
            self._open_inbox(call, item.flags)
        if timeout_nano:
            call.timer = get_hub().loop.timer(timeout_nano / 1e9)
            call.timer.start(self._on_deadline, item.stream_id)
        self._calls[item.stream_id] = call
        self._running += 1
        self._quiet.clear()
        call.job = self._server.workers.submit(self._run, call)

    @staticmethod
    def _open_inbox(call, flags):
        call.inbox = Inbox(f"a message of {call.context.service}/{call.context.method}")
        call.context.stream = RequestStream(call.method.request, call.inbox)
        whole = not flags & frame.REMOTE_OPEN       # no data frames will follow
        if call.payload or (whole and not flags & frame.NO_DATA and not flags & frame.REMOTE_CLOSED):
            call.inbox.put(call.payload)
        if whole:
            call.inbox.end()

    # From here on: in a worker's greenlet.

    def _run(self, call):
        started = time.monotonic()
        try:
            if call.method.server_stream:
                self._run_stream(call)
            else:
                response = call.handler(self._request_of(call), call.context)
                self._answer(call, frame.RESPONSE, status.encode_response(_serialize(call.method, response)))
        except BaseException as exc:    # gevent.Timeout is no Exception, and the caller waits for an answer
            self._answer_failure(call, exc)
            if not isinstance(exc, (Exception, gevent.Timeout)):
                raise
        finally:
            self._running -= 1
            if self._running == 0:
                self._quiet.set()
            if self._server.on_call is not None:
                context = call.context
                self._server.on_call(context.service, context.method, time.monotonic() - started, call.code)

    def _run_stream(self, call):
        messages = iter(call.handler(self._request_of(call), call.context))
        try:
            for message in messages:
                self._connection.wait_writable()
                if not self._is_open(call):
                    return
                self._connection.send(call.stream_id, frame.DATA, _serialize(call.method, message))
            self._answer(call, frame.DATA, b"", frame.REMOTE_CLOSED | frame.NO_DATA)
        finally:
            if hasattr(messages, "close"):
                messages.close()        # the generator of a handler cleans up here, not at some later time

    @staticmethod
    def _request_of(call):
        if call.method.client_stream:
            return None
        try:
            return proto.decode(call.method.request, call.payload)
        except errors.InvalidArgument as exc:
            raise errors.Internal(f"error unmarshalling payload: {exc}") from exc
        finally:
            call.payload = None

    def _answer(self, call, *parts):
        """Send the frame that ends a call, unless it has been ended."""
        if self._is_open(call):
            self._connection.send(call.stream_id, *parts)
            self._close_call(call, errors.OK)

    def _answer_failure(self, call, exc):
        code, text = errors.status_of(exc)
        if code == errors.INTERNAL and not isinstance(exc, errors.KatashimError):
            log.error("%s/%s failed", call.context.service, call.context.method, exc_info=exc)
        if self._is_open(call):
            self._close_call(call, code)
            self._send(call.stream_id, frame.RESPONSE, status.encode_error(code, text))

    def _is_open(self, call):
        return self._calls.get(call.stream_id) is call

    def _close_call(self, call, code):
        del self._calls[call.stream_id]
        call.close(code)


def _serialize(method, message):
    """The bytes of what a handler returned. Task v2 and v3 have equal messages in two packages, so it is
    the bare name that must be right."""
    if message is None:
        return b""
    if type(message) is not method.response and \
            message.DESCRIPTOR.name != method.response.DESCRIPTOR.name:
        raise TypeError(f"{method.name} returned a {message.DESCRIPTOR.full_name}, "
                        f"not a {method.response.DESCRIPTOR.full_name}")
    return message.SerializeToString()
