"""Reaps orphans that the kernel hands to the shim because it is a subreaper.

A helper that daemonizes, or a hook's forgotten child, becomes the shim's child when its parent ends,
and a zombie when it ends itself. The shim's own children (katashim.child) are waited for by whoever
started them, and their status must not be taken away. So a zombie is only looked at (WNOWAIT), and
reaped when it is none of ours and was there already a second ago: whoever started it in a way that
katashim.child does not know (the subprocess module) has reaped it by then.
"""

import logging
import os
import signal

from gevent.event import Event

from katashim import child, green

log = logging.getLogger(__name__)

_SECOND_LOOK_S = 1.0


class Reaper:
    """Reaps in a greenlet, woken by SIGCHLD.

    :param is_ours: ``is_ours(pid)``, whether somebody here waits for that child.
    """

    def __init__(self, is_ours=None, second_look_s=_SECOND_LOOK_S):
        self._is_ours = is_ours or (lambda pid: pid in child.living())
        self._second_look_s = second_look_s
        self._wake = Event()
        self._suspect = None        # pid of a zombie that nobody here knows, seen once

    def start(self):
        """Take over SIGCHLD; called from the main greenlet, once."""
        signal.signal(signal.SIGCHLD, lambda number, frame: self._wake.set())
        self._wake.set()            # for what ended before
        return green.spawn("reaper", self._run)

    def _run(self):
        timeout_s = None
        while True:
            self._wake.wait(timeout_s)
            self._wake.clear()
            timeout_s = self._second_look_s if self.sweep() else None

    def sweep(self):
        """Reap the strays that were there at the last sweep; True when a zombie is left to look at again."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:           # no children at all
                found = None
            if found is None:
                self._suspect = None
                return False
            pid = found.si_pid
            if self._is_ours(pid) or pid != self._suspect:
                self._suspect = None if self._is_ours(pid) else pid
                return True
            self._suspect = None
            self._reap(pid)

    def _reap(self, pid):
        try:
            status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        except ChildProcessError:               # its owner was faster
            return
        if status is not None:
            log.debug("reaped the orphan %d (status %d)", pid, status.si_status)
