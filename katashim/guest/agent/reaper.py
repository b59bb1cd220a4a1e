"""The one place that waits for children: every process below the agent ends here.

As PID 1 (or as a subreaper) the agent inherits every orphan of the guest, so it must wait for any
child, and then nobody else may. A thread does; :func:`adopt` says which ends somebody wants to hear of.

A child may end before its starter knows the pid (crun's grandchildren do): ends that nobody has asked
for yet are kept while a :class:`starting` block is open. Called by crun.py, enter.py, process.py.
"""

import os
import threading
import time

from katashim.guest.agent import log

_changed = threading.Condition()    # guards all below; notified when a child may exist
_wanted = {}                        # pid -> Exit
_unclaimed = {}                     # pid -> status, while _starters > 0
_starters = 0
_running = False


class Exit:
    """How a child ended: to be waited for.

    :ivar status: None while it runs, then its exit status, or 128 + the signal that killed it.
    :ivar fd: an eventfd that is readable from its end on, for poll,
        and open for as long as anybody has this object.
    """

    def __init__(self, pid):
        self.pid = pid
        self.status = None
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._done = threading.Event()
        self._callbacks = []
        self._lock = threading.Lock()       # guards _callbacks against the end

    def wait(self, timeout_s=None):
        """Block until it ended; returns the status, or None when time ran out."""
        self._done.wait(timeout_s)
        return self.status

    def on_end(self, function):
        """Call `function` when it ended, from the reaper's thread, or now if it has. It must not block."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(function)
                return
        function()

    def __del__(self):
        os.close(self.fd)

    def _end(self, status):
        with self._lock:
            self.status = status
            os.eventfd_write(self.fd, 1)
            self._done.set()
        for function in self._callbacks:
            function()


class starting:
    """A block that starts children and adopts them: none of their ends is missed inside."""

    def __enter__(self):
        global _starters
        with _changed:
            _starters += 1
            _changed.notify()
        return self

    def __exit__(self, *error):
        global _starters
        with _changed:
            _starters -= 1
            if _starters == 0:
                _unclaimed.clear()
        return False

    def adopt(self, pid):
        """The :class:`Exit` of `pid`, a child or a grandchild that the agent inherits."""
        with _changed:
            end = _wanted.get(pid)
            if end is None:
                end = _wanted[pid] = Exit(pid)
                if pid in _unclaimed:
                    _finish(pid, _unclaimed.pop(pid))
            _changed.notify()
        return end


def start():
    """Start the thread, once."""
    global _running
    if not _running:
        _running = True
        threading.Thread(target=_reap, name="reaper", daemon=True).start()


def _reap():
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            with _changed:
                _changed.wait(0.05 if _starters else None)
            continue
        code = os.waitstatus_to_exitcode(status)
        try:
            with _changed:
                _finish(pid, code if code >= 0 else 128 - code)
        except Exception:  # noqa: BLE001  the reaper must live on: without it no exit is ever seen
            log.unforeseen("reaper", f"end of process {pid}")


def _finish(pid, status):
    end = _wanted.pop(pid, None)
    if end is not None:
        end._end(status)
    elif _starters:
        _unclaimed[pid] = status


def run(start_child, timeout_s, what):
    """Start a child and wait for it; returns its status.

    :param start_child: called without arguments, returns a pid.
    :raises TimeoutError: it still runs after `timeout_s`; it has been killed.
    """
    with starting() as children:
        end = children.adopt(start_child())
    status = end.wait(timeout_s)
    if status is None:
        os.kill(end.pid, 9)
        end.wait(5)
    if status is None:
        raise TimeoutError(f"waited {timeout_s} s for {what}")
    return status


def gone(pid, timeout_s):
    """Poll until `pid`, which may be no child of ours, does not exist; True when it is gone."""
    limit = time.monotonic() + timeout_s
    while os.path.exists(f"/proc/{pid}"):
        if time.monotonic() > limit:
            return False
        time.sleep(0.005)
    return True
