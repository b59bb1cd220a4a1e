"""gevent, as this daemon uses it: the patching, deadlines, native threads, recycled workers.

The only module that names gevent's monkey patching (kept by test/test_architecture.py). Everybody
who waits uses :class:`deadline`, so that an expired wait names what it waited for; everybody who
must make a call the kernel may sit on uses :func:`in_thread`, so that the hub never blocks.
"""

import logging
import time

import gevent
from gevent import get_hub

from katashim.errors import DeadlineExceeded

log = logging.getLogger(__name__)

_THREADS = 32           # enough for every blocking teardown of a large pod at once


def patch():
    """Make the standard library cooperative, for the daemon.

    Leaner than gevent's ``patch_all()``: no scan of installed entry points (27 ms at start), no ssl
    (6 MiB), and fork, waitpid, subprocess and signals stay native, for katashim.child reaps by pidfd.
    """
    import gevent.events
    gevent.events.notify_and_call_entry_points = gevent.events.notify
    from gevent import monkey
    monkey.patch_all(ssl=False, subprocess=False, os=False, signal=False)


class deadline:     # lower case, for it reads as a statement: with deadline(5, "the agent"): ...
    """A bound on the waits made inside the ``with`` block.

    :param seconds: how long, or None for no bound.
    :param what: what is waited for, as the object of the sentence "nothing after 5 s while waiting
        for ..."; a string, or a callable that makes it when the time has come.
    :raises DeadlineExceeded: when time runs out.
    """

    def __init__(self, seconds, what):
        self.seconds, self.what = seconds, what
        self._timeout = gevent.Timeout(seconds)

    def __enter__(self):
        self._timeout.start()
        return self

    def __exit__(self, kind, error, trace):
        self._timeout.close()
        if error is self._timeout:
            what = self.what() if callable(self.what) else self.what
            raise DeadlineExceeded(
                f"nothing after {self.seconds:g} s while waiting for {what}") from None
        return False


class Stopwatch:
    """What is left of a budget of seconds that several waits share."""

    def __init__(self, seconds):
        self._end = time.monotonic() + seconds

    def left(self, least=0.0):
        """Seconds left, never below `least`."""
        return max(least, self._end - time.monotonic())


_pool = None


def in_thread(fn, *args, what, timeout_s=10):
    """Run a call that may block in the kernel in a native thread; only this greenlet waits for it.

    :param what: what the call does, for the error: "unmounting /run/x".
    :param timeout_s: seconds; when they are over the thread is abandoned, not interrupted.
    :returns: what `fn` returns. :raises DeadlineExceeded: and whatever `fn` raises.
    """
    global _pool
    if _pool is None:
        from gevent.threadpool import ThreadPool  # 8 ms and 2 MiB that the first RPC need not wait for
        _pool = ThreadPool(_THREADS)
    with deadline(timeout_s, what):
        result, error = _pool.spawn(_outcome, fn, args).get()
    if error is not None:
        raise error
    return result


def _outcome(fn, args):
    """Result or error as a value: gevent's pool prints the trace of every exception it sees."""
    try:
        return fn(*args), None
    except Exception as exc:  # noqa: BLE001  handed over, and raised by in_thread
        return None, exc


def spawn(name, fn, *args):
    """Start a greenlet called `name`; an error that it does not handle is logged with its trace."""
    greenlet = gevent.spawn(_guarded, name, fn, *args)
    greenlet.name = name
    return greenlet


def _guarded(name, fn, *args):
    try:
        return fn(*args)
    except Exception:
        log.exception("greenlet %s failed", name)
        return None


class Job:
    """One submitted call of a :class:`WorkerPool`."""

    __slots__ = ("args", "done", "fn", "worker")

    def __init__(self, fn, args):
        self.fn, self.args = fn, args
        self.worker = None
        self.done = False

    def cancel(self, error):
        """Raise `error` in the call at its present switch point; does nothing once it has ended."""
        if not self.done:
            get_hub().loop.run_callback(self._throw, error)

    def _throw(self, error):
        if not self.done and self.worker is not None:
            self.worker.throw(error)


class WorkerPool:
    """Greenlets that are used again for the next call.

    A fresh greenlet costs an mmap, an munmap and their page faults (12 us, half of the cost of a
    small request); a recycled one costs a switch. There is no upper bound: callers of the shim wait
    for minutes inside ``Wait``, and a bound would be a deadlock.

    :param name: for the log.
    :param idle_max: how many finished workers are kept.
    """

    def __init__(self, name, idle_max=64):
        self.name = name
        self._idle_max = idle_max
        self._idle = []

    def submit(self, fn, *args):
        """Call ``fn(*args)`` soon, in a greenlet of the pool; returns its :class:`Job`."""
        job = Job(fn, args)
        hub = get_hub()
        if self._idle:
            job.worker = self._idle.pop()
            hub.loop.run_callback(job.worker.switch, job)
        else:
            job.worker = gevent.spawn_raw(self._work, job)
        return job

    def _work(self, job):
        hub = get_hub()
        while True:
            worker = job.worker
            try:
                job.fn(*job.args)
            except Exception:
                log.exception("a call of %s in pool %s failed", job.fn, self.name)
            finally:
                job.done = True
            if len(self._idle) >= self._idle_max:
                return
            job = None
            self._idle.append(worker)
            job = hub.switch()
