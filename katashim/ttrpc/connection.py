"""One ttRPC connection: a socket that frames go into and come out of.

Client and server both stand on this. The rules it keeps:

* Reading never waits for writing, nor for whoever handles a frame. Frames are read in a callback of
  gevent's loop and handed on at once, so ``on_frame`` must not block.
* Writing never waits either: what the kernel does not take at once stands in a queue and goes out in
  order. Since nothing switches between the choice of a stream id and :meth:`Connection.send`, ids
  reach the wire in order too (a Go server insists on that).
* A peer that does not read cannot hang us: after `write_timeout_s` without progress, or when too much
  is queued, the connection is given up. Go's ttRPC has no such deadline (containerd/ttrpc#72).

All methods belong to the thread of the hub that made the connection.
"""

import logging
from _socket import socket as raw_socket  # without gevent's waiting around it: try first, then poll
from collections import deque
from itertools import islice

from gevent import get_hub
from gevent.event import Event

from katashim import green
from katashim.errors import ConnectionClosed, ResourceExhausted
from katashim.ttrpc import frame

log = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 60
_READ_BYTES = 64 << 10
_QUEUE_SOFT_BYTES = 1 << 20     # above this, wait_writable waits
_QUEUE_HARD_BYTES = 64 << 20    # above this, the peer is not reading
_PIECES_PER_WRITE = 64          # queued frames handed to the kernel in one call
_LAST_READS = 1024              # of a peer that takes nothing more

_READABLE, _WRITABLE = 1, 2     # the loop's event bits


class Connection:
    """Frames over a connected stream socket.

    :param sock: any kind of socket object; its descriptor is taken over.
    :param name: what the other end is, for error texts: "the agent of sandbox x".
    :param on_frame: called with each :class:`frame.Frame` or :class:`frame.Oversize`, in order.
    :param on_lost: called once with a :class:`ConnectionClosed` when the connection has ended, by
        whichever side.
    :param write_timeout_s: seconds that the peer may leave unread what we send.
    """

    def __init__(self, sock, name, on_frame, on_lost, write_timeout_s=WRITE_TIMEOUT_S):
        self.name = name
        self.closed = Event()
        self.sent_bytes = 0             # handed to the kernel so far, for maybe_executed
        self._queued_bytes = 0          # given to send() so far
        self._on_frame, self._on_lost = on_frame, on_lost
        self._write_timeout_s = write_timeout_s
        self._sock = raw_socket(fileno=sock.detach())
        self._sock.setblocking(False)
        self._loop = get_hub().loop
        self._reader = self._loop.io(self._sock.fileno(), _READABLE)
        self._writer = self._loop.io(self._sock.fileno(), _WRITABLE)
        self._stall_timer = None
        self._queue = deque()           # bytes that the kernel did not take yet
        self._writable = Event()        # the queue is short
        self._writable.set()
        self._flushed = Event()         # the queue is empty
        self._flushed.set()
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._decoder = frame.Decoder()
        self._error = None

    def start(self):
        """Begin to read."""
        self._reader.start(self._on_readable)

    def send(self, stream_id, type, payload=b"", flags=0):
        """Send one frame, or queue it; never waits.

        :returns: the offset of the frame's end in all that was ever sent: once :attr:`sent_bytes` has
            reached it, the peer may have acted on the frame.
        :raises ResourceExhausted: over the size limit; nothing was sent.
        :raises ConnectionClosed: nothing of the frame reached the peer.
        """
        if self._error is not None:
            raise ConnectionClosed(self._error.message)
        try:
            data = frame.encode(stream_id, type, payload, flags)
        except frame.MessageTooLong as exc:
            raise ResourceExhausted(f"to {self.name}: {exc}") from exc
        sent = 0 if self._queue else self._try_send(data)
        self._queued_bytes += len(data)
        if sent < len(data):
            self._enqueue(memoryview(data)[sent:])
        return self._queued_bytes

    def wait_writable(self, timeout_s=None):
        """Wait until little is queued, so that a long stream does not pile up in memory.

        :raises DeadlineExceeded: `timeout_s` seconds were not enough. :raises ConnectionClosed: it ended.
        """
        if not self._writable.is_set():
            with green.deadline(timeout_s, f"{self.name} to read what it was sent"):
                self._writable.wait()
        if self._error is not None:
            raise ConnectionClosed(self._error.message, maybe_executed=True)

    def flush(self, timeout_s=None):
        """Wait until the kernel has taken all that was sent, or the connection has ended.

        :raises DeadlineExceeded: `timeout_s` seconds were not enough.
        """
        with green.deadline(timeout_s, f"{self.name} to read what it was sent"):
            self._flushed.wait()

    def close(self, reason="it was closed from this side"):
        """End the connection; what is still queued is lost. Safe to call again."""
        self._lose(reason)

    def _try_send(self, data):
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            self._write_failed(exc)
            raise ConnectionClosed(f"the connection to {self.name} is gone: writing failed: {exc}") from exc
        self.sent_bytes += sent
        return sent

    def _enqueue(self, data):
        if not self._queue:
            self._writer.start(self._on_writable)
            self._flushed.clear()
            self._expect_progress()
        self._queue.append(data)
        waiting = self._queued_bytes - self.sent_bytes
        if waiting > _QUEUE_SOFT_BYTES:
            self._writable.clear()
        if waiting > _QUEUE_HARD_BYTES:
            self._lose(f"the other side does not read: {waiting} bytes are waiting for it")

    def _on_writable(self):
        try:
            sent = self._sock.sendmsg(list(islice(self._queue, _PIECES_PER_WRITE)))
        except BlockingIOError:
            return
        except OSError as exc:
            self._write_failed(exc)
            return
        self.sent_bytes += sent
        self._drop_sent(sent)
        if self._queued_bytes - self.sent_bytes <= _QUEUE_SOFT_BYTES:
            self._writable.set()
        if self._queue:
            self._expect_progress()
        else:
            self._writer.stop()
            self._stall_timer.close()
            self._flushed.set()

    def _drop_sent(self, sent):
        while sent:
            first = self._queue.popleft()
            if len(first) > sent:
                self._queue.appendleft(first[sent:])
                return
            sent -= len(first)

    def _expect_progress(self):
        """(Re)start the clock of the peer that is to read."""
        if self._stall_timer is not None:
            self._stall_timer.close()
        self._stall_timer = self._loop.timer(self._write_timeout_s)
        self._stall_timer.start(self._on_stall)

    def _on_stall(self):
        self._lose(f"the other side has read nothing for {self._write_timeout_s:g} s")

    def _write_failed(self, exc):
        """The peer takes nothing more, but what it said before may still lie in the kernel: that is read
        first, so that a call that was answered is not reported as lost. Done from the loop, because a
        handler of frames may be what is writing."""
        self._writer.stop()
        self._loop.run_callback(self._read_rest, f"writing failed: {exc}")

    def _read_rest(self, reason):
        for _ in range(_LAST_READS):
            if self._error is not None or not self._read_once():
                break
        self._lose(reason)

    def _on_readable(self):
        self._read_once()

    def _read_once(self):
        """Take one buffer full off the socket; False when there is nothing (more) to read."""
        try:
            count = self._sock.recv_into(self._buffer)
        except BlockingIOError:
            return False
        except OSError as exc:
            self._lose(f"reading failed: {exc}")
            return False
        if count == 0:
            self._lose("the other side closed it" +
                       (" in the middle of a frame" if self._decoder.in_frame else ""))
            return False
        try:
            for item in self._decoder.feed(self._buffer[:count]):
                self._on_frame(item)
                if self._error is not None:
                    return False
        except Exception as exc:            # a bug of ours: the state of the streams is not to be trusted
            log.exception("%s: a frame could not be handled", self.name)
            self._lose(f"a frame could not be handled: {exc!r}")
            return False
        return True

    def _lose(self, reason):
        if self._error is not None:
            return
        self._error = ConnectionClosed(f"the connection to {self.name} is gone: {reason}")
        for watcher in (self._reader, self._writer, self._stall_timer):
            if watcher is not None:
                watcher.close()
        self._sock.close()
        self._queue.clear()
        self._buffer = None
        self.closed.set()
        self._writable.set()
        self._flushed.set()
        self._on_lost(self._error)
