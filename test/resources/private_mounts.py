"""A mount namespace of its own for a test, as the shim has one."""

import ctypes
import functools
import os
import select
import signal
import sys
import traceback

import gevent

from katashim import child, green

CLONE_NEWNS = 0x00020000
_MS_REC, _MS_SLAVE, _MS_SHARED = 0x4000, 1 << 19, 1 << 20
_TEST_S = 60


def enter():
    """Move this (forked, single-threaded) process into a mount namespace of its own: what is mounted here
    stays here, as in the shim."""
    libc = ctypes.CDLL(None, use_errno=True)
    for result in (libc.unshare(CLONE_NEWNS),
                   libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None),
                   libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SHARED), None)):
        assert result == 0, os.strerror(ctypes.get_errno())


def fork(function, *args):
    """Run ``function(*args)`` in a forked process in its own mount namespace; returns its pid. It exits with
    0, or with 1 and the trace on stderr."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        gevent.reinit()
        green._pool = None              # its threads stayed behind in the parent
        enter()
        function(*args)
        status = 0
    except BaseException:  # noqa: BLE001  the parent sees the status, the reader the trace
        traceback.print_exc()
    finally:
        for orphan in child.living():       # a failed test leaves its daemons; they are our children still
            os.kill(orphan, signal.SIGKILL)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid):
    """The exit status of a forked process; it is killed when it takes longer than a minute."""
    pidfd = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(_TEST_S * 1000):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def private_mounts(test):
    """Decorator: the test runs in a forked process with its own mount namespace."""
    @functools.wraps(test)
    def isolated(**fixtures):
        assert wait(fork(functools.partial(test, **fixtures))) == 0, "see the trace on stderr"
    return isolated
