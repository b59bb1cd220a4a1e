"""Threads that run RPCs, recycled: starting one costs more than the smaller RPCs do.

There is no upper limit, because an RPC may wait for as long as a container lives (WaitProcess, ReadStdout,
GetOOMEvent), and those that end them must always get a thread. Called by server.py.
"""

import threading
from _queue import SimpleQueue

from katashim.guest.agent import log

_KEEP_IDLE = 8


class Workers:
    """A pool of threads. :meth:`submit` never waits."""

    def __init__(self):
        self._tasks = SimpleQueue()
        self._lock = threading.Lock()       # guards _idle
        self._idle = 0                      # threads that wait, minus tasks that they will find

    def submit(self, function, *arguments):
        """Run ``function(*arguments)`` on some thread, soon."""
        with self._lock:
            spare = self._idle > 0
            if spare:
                self._idle -= 1
        if spare:
            self._tasks.put((function, arguments))
        else:
            threading.Thread(target=self._work, args=(function, arguments), name="rpc", daemon=True).start()

    def _work(self, function, arguments):
        while True:
            try:
                function(*arguments)
            except Exception:  # noqa: BLE001  a thread of the pool outlives what it runs; say so and go on
                log.unforeseen("workers", "a task failed")
            function = arguments = None
            with self._lock:
                if self._idle >= _KEEP_IDLE:
                    return
                self._idle += 1
            function, arguments = self._tasks.get()
