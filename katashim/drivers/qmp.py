"""QMP, QEMU's machine protocol, over the VMM's one channel.

One JSON object a line, both ways: a greeting, commands with ids, their replies, and events at any
time between them. One greenlet reads each connection and hands replies to the caller that has the
turn and events to whoever subscribed; commands run one at a time (katashim.drivers.channel).
File descriptors travel as SCM_RIGHTS with the first byte of their command.

Source: docs/interop/qmp-spec.txt and docs/interop/qemu-qmp-ref of QEMU. Used by katashim.drivers.qemu.
"""

import json
import logging
import os
import struct
import time
from typing import NamedTuple

from gevent import socket
from gevent.event import AsyncResult, Event

from katashim import green
from katashim.drivers.channel import Channel
from katashim.errors import ConnectionClosed, HypervisorError, InvalidArgument, QmpError, Unavailable

log = logging.getLogger(__name__)

LINE_MAX = 16 * 1024 * 1024         # far above any reply; an endless line is not worth the memory
PATH_MAX = 107                      # sun_path without its final NUL (unix(7))
_RECV_BYTES = 65536


def listen(path):
    """A listening socket at `path` for QEMU to inherit, so that no connect ever comes too early.

    Give its fd to QEMU as ``-chardev socket,fd=N,server=on,wait=off``, then close it here.

    :raises InvalidArgument: the path is too long for a unix socket.
    """
    if len(os.fsencode(path)) > PATH_MAX:
        raise InvalidArgument(f"the socket path {path} has more than {PATH_MAX} bytes")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(2)
    except OSError as exc:
        listener.close()
        raise HypervisorError(f"cannot listen on {path}: {exc.strerror}") from exc
    return listener


def dial(path):
    """Connect to QEMU's monitor socket. :raises Unavailable: nobody listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as exc:
        sock.close()
        raise Unavailable(f"cannot connect to QEMU's monitor at {path}: {exc.strerror}") from exc
    return sock


class Qmp:
    """QEMU's monitor: commands, and subscriptions to events that outlive a broken connection.

    :param name: what it is, for errors: "QEMU of sandbox x".
    :param connect: function without arguments that returns a connected stream socket.
    """

    def __init__(self, name, connect):
        self.name = name
        self.channel = Channel(name, self._open, clean=(QmpError,))
        self._connect = connect
        self._subscriptions = []

    def execute(self, command, *, send_fds=(), timeout_s=10, **arguments):
        """Run one QMP command and return the ``return`` member of its reply.

        :param send_fds: descriptors to send along (``getfd``, ``add-fd``); QEMU gets copies.
        :param timeout_s: seconds, the waiting for the turn included.
        :param arguments: the command's; those with a hyphen as ``**{"node-name": "x"}``.
        :raises QmpError: QEMU refused. :raises DeadlineExceeded: no complete reply in time.
        :raises ConnectionClosed: QEMU hung up; ``maybe_executed`` when the command had been sent.
        """
        begun = time.monotonic()
        reply = self.channel.exchange(
            command, lambda connection: connection.call(command, arguments, send_fds), timeout_s)
        log.debug("QMP %s: %.1f ms", command, (time.monotonic() - begun) * 1000)
        return reply

    def open(self, timeout_s):
        """Connect, read the greeting and negotiate capabilities now."""
        self.channel.open(timeout_s)

    def hold(self, op, timeout_s):
        """Keep the monitor for several commands in a row: ``with qmp.hold("resize", 20):``."""
        return self.channel.hold(op, timeout_s)

    def subscribe(self, *names, match=None):
        """Collect events from now on: ``with qmp.subscribe("DEVICE_DELETED") as events:``.

        Subscribe before the command that causes the event, then nothing can be missed.

        :param names: of events; none of them means all.
        :param match: ``{member: value}`` that the event's data must have, or a function of the data.
        """
        return Subscription(self, names, match or {})

    def wait_event(self, name, match=None, timeout_s=10):
        """Wait for an event that comes from now on; returns its data. See also :meth:`subscribe`."""
        with self.subscribe(name, match=match) as events:
            return events.wait(timeout_s).data

    def close(self, reason):
        """End it: commands under way, queued, and waits for events fail at once. Never blocks."""
        self.channel.close(reason)
        for subscription in self._subscriptions:
            subscription._arrived.set()

    def _open(self):
        connection = Connection(self._connect(), self.name, self._dispatch)
        try:
            connection.negotiate()
        except BaseException:
            connection.close()
            raise
        return connection

    def _dispatch(self, message):
        event = QmpEvent(message["event"], message.get("data", {}), _seconds(message.get("timestamp")))
        log.debug("QMP event %s %s", event.name, event.data)
        for subscription in self._subscriptions:
            subscription._offer(event)


class QmpEvent(NamedTuple):
    """An event."""

    name: str
    data: dict
    at: float           # when QEMU sent it, seconds since the epoch


def _seconds(timestamp):
    return timestamp["seconds"] + timestamp["microseconds"] / 1e6 if timestamp else 0.0


class Subscription:
    """Events that arrived since it was made; a context manager. See :meth:`Qmp.subscribe`."""

    def __init__(self, qmp, names, match):
        self._qmp, self._names, self._match = qmp, names, match
        self._events = []
        self._arrived = Event()

    def __enter__(self):
        self._qmp._subscriptions.append(self)
        return self

    def __exit__(self, *error):
        self._qmp._subscriptions.remove(self)
        return False

    def wait(self, timeout_s):
        """The next event, a :class:`QmpEvent`.

        :raises DeadlineExceeded: none in time. :raises ConnectionClosed: QEMU is gone for good.
        """
        what = " or ".join(self._names) or "any event"
        detail = "" if callable(self._match) or not self._match else f" {self._match}"
        with green.deadline(timeout_s, f"{what}{detail} from {self._qmp.name}"):
            while not self._events:
                if self._qmp.channel.closed:
                    raise ConnectionClosed(f"{self._qmp.name} is gone; {what} will not come")
                self._arrived.clear()
                self._arrived.wait()
        return self._events.pop(0)

    def _offer(self, event):
        if self._names and event.name not in self._names:
            return
        if callable(self._match):
            wanted = self._match(event.data)
        else:
            wanted = all(event.data.get(member) == value for member, value in self._match.items())
        if wanted:
            self._events.append(event)
            self._arrived.set()


class Connection:
    """One QMP session on one socket.

    :param on_event: called in the reading greenlet with each event's message; must not block.
    """

    def __init__(self, sock, name, on_event):
        self.closed = False
        self._sock, self._name, self._on_event = sock, name, on_event
        self._number = 0
        self._in_flight = None              # id of the command, while its reply is awaited
        self._reply = AsyncResult()         # at first, the greeting
        self._reader = green.spawn(f"QMP reader of {name}", self._read)

    def negotiate(self):
        """Read the greeting and leave negotiation mode."""
        greeting = self._reply.get()
        if "QMP" not in greeting:
            raise HypervisorError(f"{self._name} greets with {str(greeting)[:80]}: that is not QMP")
        self.call("qmp_capabilities", {}, ())

    def call(self, command, arguments, fds):
        """Send a command and wait for its reply; see :meth:`Qmp.execute`."""
        self._number += 1
        message = {"execute": command, "id": self._number}
        if arguments:
            message["arguments"] = arguments
        self._reply, self._in_flight = AsyncResult(), self._number
        self._send(json.dumps(message).encode() + b"\n", fds)
        reply = self._reply.get()
        if "error" in reply:
            raise QmpError(reply["error"].get("class", "no class"), reply["error"].get("desc", ""), message)
        return reply["return"]

    def close(self):
        """Hang up; who waits for a reply gets ConnectionClosed."""
        self._fail(ConnectionClosed(f"the connection to {self._name} was closed", maybe_executed=True))

    def _send(self, line, fds):
        if self.closed:
            raise ConnectionClosed(f"the connection to {self._name} is closed")
        try:
            if fds:
                rights = struct.pack(f"{len(fds)}i", *fds)
                sent = self._sock.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                line = line[sent:]
            self._sock.sendall(line)
        except OSError as exc:
            raise ConnectionClosed(
                f"{self._name} hung up: {exc.strerror or exc}", maybe_executed=True) from exc

    # -- reading ----------------------------------------------------------------------------------
    def _read(self):
        """Read until the connection ends, in a greenlet of its own; the only reader of the socket."""
        buffer = bytearray()
        searched = 0
        while not self.closed:
            try:
                piece = self._sock.recv(_RECV_BYTES)
            except OSError as exc:
                return self._fail(ConnectionClosed(
                    f"{self._name} hung up: {exc.strerror or exc}", maybe_executed=True))
            if not piece:
                return self._fail(ConnectionClosed(f"{self._name} hung up", maybe_executed=True))
            buffer += piece
            while (end := buffer.find(b"\n", searched)) >= 0:
                line = bytes(buffer[:end])
                del buffer[:end + 1]
                searched = 0
                self._take(line)
            searched = len(buffer)
            if searched > LINE_MAX:
                self._fail(HypervisorError(
                    f"{self._name} sent a line of more than {LINE_MAX} bytes; that is not QMP"))
        return None

    def _take(self, line):
        if not line.strip():
            return
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self._fail(HypervisorError(f"{self._name} sent what is not a JSON object: {line[:80]!r}"))
        elif "event" in message:
            self._on_event(message)
        elif "QMP" in message or "return" in message or "error" in message:
            self._answer(message)
        else:
            self._fail(HypervisorError(f"{self._name} sent what is not QMP: {line[:80]!r}"))

    def _answer(self, message):
        # An error without an id is QEMU's answer to a line that it could not parse.
        expected = message.get("id") == self._in_flight or ("error" in message and "id" not in message)
        if self._reply.ready() or not expected:
            self._fail(HypervisorError(f"{self._name} answered what nobody asked: {str(message)[:80]}"))
        else:
            self._reply.set(message)

    def _fail(self, error):
        if self.closed:
            return
        self.closed = True
        self._sock.close()
        if not self._reply.ready():
            self._reply.set_exception(error)

