"""cgroups of the guest: counters for StatsContainer, the freezer, killing, and the watch for OOM kills.

The agent mounts either cgroup2 or version 1, never both; crun makes the cgroups, this reads and pokes
them. The numbers come out under version 1's names, as upstream's agent reports them for both (times in
nanoseconds, a limit of 0 where there is none). Called by container.py, services.py.
"""

import os
import select
import threading
import time
from errno import EBUSY

from katashim.guest.agent import log

ROOT = "/sys/fs/cgroup"
_CGROUP2_MAGIC_FILE = f"{ROOT}/cgroup.controllers"


def is_unified():
    """Whether the guest has cgroup2."""
    return os.path.exists(_CGROUP2_MAGIC_FILE)


def is_mounted():
    """Whether the guest has cgroups that containers can be put into."""
    return is_unified() or os.path.isdir(f"{ROOT}/devices")


class Cgroup:
    """The cgroup of one container.

    :param path: below the root of each hierarchy, with a slash before it.
    """

    def __init__(self, path):
        self.path = path
        self._unified = is_unified()

    def directory(self, controller):
        """Its directory; `controller` does not matter for cgroup2."""
        return f"{ROOT}{self.path}" if self._unified else f"{ROOT}/{controller}{self.path}"

    def freeze(self, frozen, timeout_s=10):
        """Stop or continue all processes, and wait until it is so.

        :raises TimeoutError: it is not so after `timeout_s`.
        """
        if self._unified:
            _write(f"{self.directory('')}/cgroup.freeze", str(int(frozen)))
            self._wait(lambda: self._event("frozen") == int(frozen), timeout_s, "the container to freeze")
        else:
            state = "FROZEN" if frozen else "THAWED"
            path = f"{self.directory('freezer')}/freezer.state"
            _write(path, state)
            self._wait(lambda: _read(path).strip() == state, timeout_s, f"the container to be {state}")

    def kill(self):
        """SIGKILL every process in it and below."""
        try:
            if self._unified:
                _write(f"{self.directory('')}/cgroup.kill", "1")
            else:
                self._kill_each()
        except FileNotFoundError:
            pass        # gone already

    def remove(self, timeout_s=5):
        """Remove it and what is below it, once its processes have gone.

        :raises TimeoutError: some are still there after `timeout_s`.
        """
        directories = [self.directory("")] if self._unified else [
            f"{ROOT}/{name}{self.path}" for name in os.listdir(ROOT)]
        for directory in directories:
            self._wait(lambda directory=directory: _remove_tree(directory), timeout_s,
                       f"{directory} to be empty")

    def widen_cpus(self, cpus):
        """Let it run on the CPUs of the list `cpus` ("0-3"), new ones too. cgroup2 does so by itself."""
        if not self._unified:
            path = f"{ROOT}/cpuset"
            for name in self.path.strip("/").split("/"):
                path = f"{path}/{name}"
                _write(f"{path}/cpuset.cpus", cpus)

    def pids(self):
        """The processes in it, without those of cgroups below it."""
        return [int(line) for line in _read(f"{self.directory('pids')}/cgroup.procs").split()]

    def _kill_each(self):
        """Version 1 has no cgroup.kill: freeze, signal each, thaw."""
        _write(f"{self.directory('freezer')}/freezer.state", "FROZEN")
        for base, _, _ in os.walk(self.directory("freezer")):
            for line in _read(f"{base}/cgroup.procs").split():
                try:
                    os.kill(int(line), 9)
                except ProcessLookupError:
                    pass
        _write(f"{self.directory('freezer')}/freezer.state", "THAWED")

    def _event(self, name):
        return _table(f"{self.directory('')}/cgroup.events").get(name)

    def _wait(self, reached, timeout_s, what):
        limit = time.monotonic() + timeout_s
        while not reached():
            if time.monotonic() > limit:
                raise TimeoutError(f"waited {timeout_s} s for {what}")
            time.sleep(0.002)


class OomWatch:
    """Tells of OOM kills, once for each container, from a thread that polls all of their cgroups.

    :param tell: called with a container id.
    """

    def __init__(self, tell):
        self._tell = tell
        self._lock = threading.Lock()       # guards _watched and _thread
        self._watched = {}                  # fd to poll -> (container id, Cgroup, all its fds)
        self._poller = select.poll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)    # makes the poll take up another fd
        self._poller.register(self._wake, select.POLLIN)
        self._thread = None

    def watch(self, cid, cgroup):
        """Watch the cgroup of a container that has been started."""
        try:
            fds, mask = self._open(cgroup)
        except FileNotFoundError:
            log.debug("oom", f"{cid} has no memory cgroup")
            return
        with self._lock:
            self._watched[fds[0]] = (cid, cgroup, fds)
            self._poller.register(fds[0], mask)
            os.eventfd_write(self._wake, 1)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="oom", daemon=True)
                self._thread.start()

    def look(self, cid):
        """Look at a container now: its end may come before the thread's next round."""
        with self._lock:
            for fd in self._fds_of(cid):
                self._look(fd)

    def forget(self, cid):
        """Stop watching a container."""
        with self._lock:
            for fd in self._fds_of(cid):
                self._close(fd)

    def _fds_of(self, cid):
        return [fd for fd, (known, _, _) in self._watched.items() if known == cid]

    def _open(self, cgroup):
        """``(fds, poll mask)``; the first fd is the one that becomes ready."""
        directory = cgroup.directory("memory")
        if is_unified():
            return [os.open(f"{directory}/memory.events", os.O_RDONLY | os.O_CLOEXEC)], select.POLLPRI
        control = os.open(f"{directory}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        _write(f"{directory}/cgroup.event_control", f"{event} {control}")
        return [event, control], select.POLLIN

    def _run(self):
        while True:
            for fd, _ in self._poller.poll():
                with self._lock:
                    self._look(fd)

    def _look(self, fd):
        if fd == self._wake:
            os.eventfd_read(fd)
        if fd not in self._watched:
            return
        cid, cgroup, _ = self._watched[fd]
        directory = cgroup.directory("memory")
        if not os.path.isdir(directory):
            self._close(fd)
        elif is_unified():
            if _counter(os.pread(fd, 4096, 0).decode(), "oom_kill"):
                self._close(fd)
                self._tell(cid)
        else:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return
            self._tell(cid)

    def _close(self, fd):
        _, _, fds = self._watched.pop(fd)
        self._poller.unregister(fd)
        for each in fds:
            os.close(each)


def _remove_tree(directory):
    """Remove a cgroup with those below it; False when one of them still has processes."""
    for base, _, _ in os.walk(directory, topdown=False):
        try:
            os.rmdir(base)
        except FileNotFoundError:
            pass
        except OSError as exc:
            if exc.errno != EBUSY:
                raise
            return False
    return True


def _counter(text, name):
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _table(path):
    """A file of lines ``name number`` as a dict; {} when there is none."""
    try:
        return {key: int(value) for key, value in (line.split() for line in _read(path).splitlines())}
    except FileNotFoundError:
        return {}


def _read(path):
    with open(path) as file:
        return file.read()


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)
