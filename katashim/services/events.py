"""Task events on their way to containerd: ``containerd.services.events.ttrpc.v1.Events/Forward``.

One queue and one greenlet, so events arrive in the order in which they were published, and nobody
who publishes ever waits. containerd may be restarted meanwhile: an event leaves the queue only when
containerd has acknowledged it, and until then it is sent again over a new connection. (When a
connection breaks before the acknowledgement, the event may have been taken; but then containerd was
stopping and forgot it with its subscribers, and a TaskExit that is lost leaves a pod Terminating for
ever.) Used by katashim.runtime, which decides what is published when.
"""

import logging
import time
from collections import deque

import gevent
from gevent import socket
from gevent.event import Event

from katashim import green
from katashim.errors import ConnectionClosed, DeadlineExceeded, KatashimError, Unavailable
from katashim.ttrpc import proto
from katashim.ttrpc.client import Client

log = logging.getLogger(__name__)

_SERVICE = "containerd.services.events.ttrpc.v1.Events"
_QUEUE_MAX = 4096
_CALL_S = 10                # containerd answers in a millisecond; its own shims wait 5 s
_CONNECT_S = 5
_RETRY_FIRST_S = 0.05
_RETRY_MAX_S = 5.0
_LOST = (ConnectionClosed, DeadlineExceeded, Unavailable, OSError)


class Publisher:
    """Publishes events for one shim.

    :param address: path of containerd's ttRPC socket (``$TTRPC_ADDRESS``), or "" for none: events are
        then only logged (CRI-O learns of them by asking).
    :param namespace: containerd's namespace of the containers.
    :param queue_max: how many events are kept for a containerd that is away; beyond, the oldest is
        given up with an error in the log.
    """

    def __init__(self, address, namespace, queue_max=_QUEUE_MAX):
        self._path = address.removeprefix("unix://")
        self._namespace = namespace
        self._queue_max = queue_max
        self._queue = deque()       # (topic, ForwardRequest), without the one that is being sent
        self._work = Event()        # the queue has something
        self._idle = Event()        # the queue is empty and nothing is being sent
        self._idle.set()
        self._client = None
        self._away = False          # containerd could not be reached; said once for each outage
        self._sender = green.spawn("event publisher", self._run) if self._path else None

    def publish(self, topic, message):
        """Queue an event; never waits.

        :param topic: such as ``/tasks/start``. :param message: a ``containerd.events`` message.
        """
        log.debug("event %s", topic, extra={"event": str(message).replace("\n", " ").strip()})
        if self._sender is None:
            return
        if len(self._queue) >= self._queue_max:
            lost, _ = self._queue.popleft()
            log.error("containerd has not taken %d events: the oldest, %s, is lost", self._queue_max, lost)
        envelope = {"timestamp": proto.timestamp(time.time_ns()), "namespace": self._namespace,
                    "topic": topic, "event": proto.pack_any(message)}
        request = proto.build(proto.service(_SERVICE)["Forward"].request, envelope=envelope)
        self._queue.append((topic, request))
        self._idle.clear()
        self._work.set()

    def flush(self, timeout_s):
        """Wait until containerd has all events; returns whether it has. Those it has not are logged."""
        if self._idle.wait(timeout_s):
            return True
        log.error("containerd has not taken these events in %g s: %s", timeout_s,
                  ", ".join(topic for topic, _ in self._queue) or "the one being sent")
        return False

    def close(self):
        """Stop, with whatever is not sent yet."""
        if self._sender is not None:
            self._sender.kill()
        self._hang_up()

    def _run(self):
        while True:
            self._work.wait()
            while self._queue:
                topic, request = self._queue.popleft()
                self._deliver(topic, request)
            self._work.clear()
            self._idle.set()

    def _deliver(self, topic, request):
        """Send one event, again and again until containerd takes or refuses it."""
        delay_s = _RETRY_FIRST_S
        while True:
            try:
                self._connected().call(_SERVICE, "Forward", request, timeout_s=_CALL_S,
                                       metadata={"containerd-namespace-ttrpc": self._namespace})
            except _LOST as exc:
                self._hang_up()
                self._note_outage(exc)
                gevent.sleep(delay_s)
                delay_s = min(2 * delay_s, _RETRY_MAX_S)
                continue
            except KatashimError as exc:        # refused: it would be refused again
                log.error("containerd refuses the event %s: %s", topic, exc)
            if self._away:
                self._away = False
                log.info("containerd takes events again")
            return

    def _connected(self):
        """The connection to containerd; a new one when there is none or it has ended."""
        if self._client is not None and self._client.closed.is_set():
            self._hang_up()
        if self._client is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(_CONNECT_S)
                sock.connect(self._path)
                sock.settimeout(None)
                self._client = Client(sock, "containerd's event service")
            finally:
                sock.close()        # the client has taken the descriptor over
        return self._client

    def _hang_up(self):
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _note_outage(self, exc):
        if not self._away:
            self._away = True
            log.warning("containerd takes no events at %s (%s); they are kept", self._path, exc)
