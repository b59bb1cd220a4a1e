"""Messages of a streaming call between the connection that reads them and the greenlet that wants them.

Used by the server (what a client streams to a handler) and the client (what a server streams back).
"""

from collections import deque

from gevent.event import Event

from katashim import green
from katashim.errors import ResourceExhausted

BUFFER_BYTES = 8 << 20          # holds at least one message of the largest size
_PER_MESSAGE = 64               # bytes that a message is reckoned to cost besides its payload


class Inbox:
    """Payloads that have come in and wait to be taken.

    ttRPC has no flow control, so a reader that is too slow must not hold up the connection that it
    shares with others: what it leaves lying is bounded, and beyond the bound its stream fails alone.

    :param what: the stream, for error texts: "a message of pkg.Svc/Method".
    """

    def __init__(self, what, limit_bytes=BUFFER_BYTES):
        self._what = what
        self._limit = limit_bytes
        self._payloads = deque()
        self._bytes = 0
        self._ended = False         # nothing more will be put
        self._error = None          # why it ended, when that was not in good order
        self._changed = Event()

    @property
    def ended(self):
        return self._ended

    def put(self, payload):
        """Add a message's bytes. False: there was no room; the inbox has failed now."""
        self._bytes += len(payload) + _PER_MESSAGE
        if self._bytes > self._limit:
            self.fail(ResourceExhausted(
                f"{self._what}: its reader was too slow, {len(self._payloads)} messages had piled up"))
            return False
        self._payloads.append(payload)
        self._changed.set()
        return True

    def end(self):
        """No more messages; those that are here can still be taken."""
        self._ended = True
        self._changed.set()

    def fail(self, error):
        """No more messages because of `error`, which the reader gets after those that are here."""
        if not self._ended:
            self._error = error
            self.end()

    def take(self, timeout_s=None):
        """The next message's bytes, or None at the end.

        :raises DeadlineExceeded: none came within `timeout_s` seconds.
        :raises KatashimError: what the stream failed with.
        """
        if not self._payloads and not self._ended:
            with green.deadline(timeout_s, self._what):
                while not self._payloads and not self._ended:
                    self._changed.clear()
                    self._changed.wait()
        if self._payloads:
            payload = self._payloads.popleft()
            self._bytes -= len(payload) + _PER_MESSAGE
            return payload
        if self._error is not None:
            raise self._error
        return None
