"""Child processes: started cheaply, waited for by pidfd, identified by pid and start time.

The shim's children are few and long-lived (the VMM, virtiofsd, the vsock backend, binary loggers),
and a pid alone is no identity: after a crash `delete` must never kill the stranger that got the
number next. So every child is known by its pid *and* its start time (field 22 of /proc/<pid>/stat).

`start_time` and `kill_identity` are plain (no gevent) for the sake of `delete`.
"""

import ctypes
import logging
import os
import select
import signal
import time

from katashim.errors import DeadlineExceeded, HypervisorError

log = logging.getLogger(__name__)

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_living = {}            # pid -> Child, for the reaper of a subreaper


def start_time(pid):
    """The start time of process `pid` in clock ticks since boot, or None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] in (b"Z", b"X") and int(fields[17]) <= 1:
        return None         # a zombie whose last thread has ended holds nothing; its parent will reap it
    return int(fields[19])


def is_alive(pid, started):
    """Whether the process `pid` that started at `started` still runs."""
    return started is not None and start_time(pid) == started


def kill_identity(pid, started, sig=signal.SIGKILL, wait_s=5):
    """Signal the process that is both `pid` and `started`, and wait until it is gone.

    Plain and blocking. The pidfd is opened first and the start time checked after, so the signal
    cannot reach a process that took over the number in between.

    :returns: True when it was there.
    :raises DeadlineExceeded: it still exists `wait_s` seconds after the signal.
    """
    if pid <= 0 or started is None:
        return False        # journalled before the spawn that never came
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if start_time(pid) != started:
            return False
        signal.pidfd_send_signal(pidfd, sig)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(wait_s * 1000):
            raise DeadlineExceeded(f"process {pid} still exists {wait_s:g} s after signal {int(sig)}")
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)


def living():
    """Pids of all children that were spawned here and have not been reaped."""
    return set(_living)


class Child:
    """A process started by :func:`spawn`.

    :ivar pid: host pid. :ivar name: what it is, for messages. :ivar start_time: clock ticks since boot.
    :ivar returncode: None while it runs, then the exit status, or minus the signal that killed it.
    """

    def __init__(self, process, name):
        from gevent import get_hub
        from gevent.event import Event
        self.pid, self.name = process.pid, name
        self.returncode = None
        self.exited = Event()
        self._process = process
        self._pidfd = os.pidfd_open(self.pid)
        self.start_time = start_time(self.pid)
        _living[self.pid] = self
        self._watcher = get_hub().loop.io(self._pidfd, 1)
        self._watcher.start(self._reap)

    def __repr__(self):
        state = "running" if self.returncode is None else f"ended with {self.returncode}"
        return f"<{self.name}, pid {self.pid}, {state}>"

    def _reap(self):
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        if result is None:
            return
        status = result.si_status
        self.returncode = status if result.si_code == os.CLD_EXITED else -status
        self._process.returncode = self.returncode
        self._watcher.stop()
        self._watcher.close()
        os.close(self._pidfd)
        _living.pop(self.pid, None)
        self.exited.set()

    def wait(self, timeout_s=None):
        """Wait for its end; returns `returncode`, or None when `timeout_s` ran out."""
        self.exited.wait(timeout_s)
        return self.returncode

    def kill(self, sig=signal.SIGKILL):
        """Send a signal; no error when it has ended."""
        if self.returncode is None:
            try:
                signal.pidfd_send_signal(self._pidfd, sig)
            except ProcessLookupError:
                pass

    def stop(self, grace_s=0.0):
        """End it: SIGTERM and `grace_s` seconds where that is above 0, then SIGKILL; reaps it.

        :raises DeadlineExceeded: the kernel does not let it die (5 s after SIGKILL).
        """
        if grace_s > 0:
            self.kill(signal.SIGTERM)
            self.wait(grace_s)
        self.kill()
        if self.wait(5) is None:
            raise DeadlineExceeded(f"{self.name} (pid {self.pid}) still exists 5 s after SIGKILL")

    def ending(self):
        """How it ended, in words."""
        if self.returncode is None:
            return "still running"
        if self.returncode < 0:
            return f"killed by {signal.Signals(-self.returncode).name}"
        return f"exited with status {self.returncode}"


def spawn(argv, *, name, env=None, cwd=None, pass_fds=(), stdin=None, stdout=None, stderr=None,
          netns=None):
    """Start a program.

    It gets its own session, default signals, only the fds named here, and, with `netns`, that
    network namespace. The parent's thread enters the namespace for the moment of the (v)fork only
    and no greenlet can run meanwhile.

    :param argv: list of str; argv[0] is an absolute path or is looked up in PATH.
    :param stdin/stdout/stderr: an fd, or None for /dev/null.
    :param netns: path of a network namespace file, or None for ours.
    :returns: :class:`Child`. :raises HypervisorError: it cannot be executed; says why.
    """
    import subprocess
    null = subprocess.DEVNULL
    options = {"env": env, "cwd": cwd, "pass_fds": pass_fds, "start_new_session": True,
               "stdin": null if stdin is None else stdin,
               "stdout": null if stdout is None else stdout,
               "stderr": null if stderr is None else stderr}
    try:
        if netns is None:
            process = subprocess.Popen(argv, **options)
        else:
            with _inside(netns):
                process = subprocess.Popen(argv, **options)
    except OSError as exc:
        raise HypervisorError(f"cannot start {name} ({argv[0]}): {exc.strerror or exc}") from exc
    _expose(process.pid)
    return Child(process, name)


def _expose(pid):
    """Let the kernel's OOM killer take it as anybody: the shim is protected, for it must tell the tale,
    but a VM that its pod's memory limit cannot hold is what has to go."""
    try:
        with open(f"/proc/{pid}/oom_score_adj", "r+") as score:
            if int(score.read()) < 0:
                score.seek(0)
                score.write("0")
    except (FileNotFoundError, ProcessLookupError):
        pass                # it has ended already


class _inside:
    """This thread inside another network namespace; only for code that cannot switch greenlets."""

    def __init__(self, path):
        self._path = path

    def __enter__(self):
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            target = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(target, self._path)
            finally:
                os.close(target)
        except OSError:
            os.close(self._home)
            raise

    def __exit__(self, *error):
        try:
            _setns(self._home, "the namespace of the shim")
        finally:
            os.close(self._home)
        return False


def _setns(fd, what):
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"entering {what}: {os.strerror(code)}")


def wait_gone(pid, started, timeout_s):
    """Plain: poll until the process `pid`/`started` is gone; True when it is."""
    end = time.monotonic() + timeout_s
    while is_alive(pid, started):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
