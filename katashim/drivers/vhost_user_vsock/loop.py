"""An epoll loop with timers, and a log that a guest cannot flood."""

import heapq
import select
import sys
import time
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT  # noqa: F401  for those who watch

_LINES_PER_WINDOW, _WINDOW_S, _LINES_IN_ALL = 20, 10, 2000


class Loop:
    """Calls handlers when fds are ready, when timers are due, and soon.

    A handler that was forgotten during a round of events is not called in that round any more. Sockets
    are closed by :meth:`close_later`, so that a number cannot come back within the round.
    """

    def __init__(self):
        self._epoll = select.epoll()
        self._handlers = {}
        self._soon = []
        self._timers = []
        self._doomed = []
        self._count = 0
        self.running = False

    def watch(self, fd, events, handler):
        """Call ``handler(events)`` when one of `events` is there; EPOLLHUP and EPOLLERR always count."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def change(self, fd, events):
        """Wait for other events on a watched fd."""
        self._epoll.modify(fd, events)

    def forget(self, fd):
        """Stop watching an fd."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def soon(self, function):
        """Call `function` after this round of events."""
        self._soon.append(function)

    def later(self, seconds, function, *args):
        """Call ``function(*args)`` in `seconds`."""
        self._count += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._count, function, args))

    def close_later(self, sock):
        """Close a socket at the end of this round."""
        self._doomed.append(sock)

    def run(self):
        """Until :meth:`stop`."""
        self.running = True
        while self.running:
            self._round()

    def stop(self):
        """End :meth:`run` after this round."""
        self.running = False

    def _round(self):
        timeout = -1
        if self._soon:
            timeout = 0
        elif self._timers:
            timeout = max(0.0, self._timers[0][0] - time.monotonic())
        for fd, events in self._epoll.poll(timeout):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)
        if self._soon:
            functions, self._soon = self._soon, []
            for function in functions:
                function()
        while self._timers and self._timers[0][0] <= time.monotonic():
            _, _, function, args = heapq.heappop(self._timers)
            function(*args)
        if self._doomed:
            for sock in self._doomed:
                sock.close()
            self._doomed.clear()


class Log:
    """Lines on stderr: at most 20 in 10 seconds and 2000 in all, the rest is counted."""

    def __init__(self, prefix):
        self._prefix = prefix
        self._window, self._lines, self._dropped, self._left = 0.0, 0, 0, _LINES_IN_ALL

    def __call__(self, message):
        now = time.monotonic()
        if now - self._window > _WINDOW_S:
            if self._dropped and self._left:
                self._write(f"{self._dropped} messages were left out")
            self._window, self._lines, self._dropped = now, 0, 0
        if self._lines >= _LINES_PER_WINDOW or not self._left:
            self._dropped += 1
            return
        self._lines += 1
        self._write(message)

    def _write(self, message):
        self._left -= 1
        print(f"{self._prefix}: {message}", file=sys.stderr, flush=True)
