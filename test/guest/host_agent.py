"""The agent as an ordinary process of this machine, in namespaces of its own, with the real crun.

Run as a program, it is the first process of those namespaces: it mounts what the agent expects to find in a
guest (an empty /run, cgroup2 as the only cgroup filesystem) and starts the agent on a unix socket. crun
refuses hosts with both cgroup versions; in its mount namespace there is only one.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_START_S = 20
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18


class HostAgent:
    """An agent that runs until :meth:`stop`. :ivar socket: path of its socket."""

    def __init__(self, directory, words=""):
        self.socket = os.path.join(directory, "agent.sock")
        self.log_path = os.path.join(directory, "agent.log")
        self._log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child",
             "--mount-proc",
             sys.executable, "-B", __file__, self.socket, words],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, cwd=REPOSITORY)

    def wait_ready(self, client):
        """Wait until it answers. :param client: a PlainClient for grpc.Health."""
        limit = time.monotonic() + _START_S
        while True:
            try:
                return client.call("Check", timeout_s=2)
            except OSError:
                assert self._process.poll() is None, self.log()
                assert time.monotonic() < limit, f"no answer from the agent for {_START_S} s\n{self.log()}"
                time.sleep(0.01)

    @property
    def root(self):
        """The root directory of its mount namespace, as a path of ours."""
        pid = self._process.pid
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return f"/proc/{file.read().split()[0]}/root"

    def namespace(self, kind):
        """The file of one of its namespaces."""
        return os.path.join(os.path.dirname(self.root), "ns", kind)

    def mount_points(self):
        """All mount points of its namespace."""
        with open(os.path.join(os.path.dirname(self.root), "mountinfo")) as file:
            return [line.split()[4] for line in file]

    def wait_end(self, timeout_s=10):
        """Its exit status when it ends by itself."""
        return self._process.wait(timeout_s)

    def log(self):
        """What it printed."""
        with open(self.log_path, errors="replace") as file:
            return file.read()

    def stop(self):
        """End it and all that runs in its namespaces."""
        # unshare takes its child along (--kill-child), and the namespace ends with that
        self._process.kill()
        self._process.wait()
        os.close(self._log)


def _mount(source, target, fstype, flags=0):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def _run(socket, words):
    _mount("none", "/", "none", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/run", "tmpfs")
    _mount("cgroup2", "/sys/fs/cgroup", "cgroup2")
    os.makedirs("/run/empty")
    with open("/run/cmdline", "w") as file:
        file.write(words)
    _mount("/run/cmdline", "/proc/cmdline", "none", 4096)
    agent = subprocess.Popen(
        [sys.executable, "-B", "-c", "from katashim.guest.agent.main import main; main()"], cwd=REPOSITORY,
        env={**os.environ, "KATA_AGENT_SERVER_ADDR": f"unix://{socket}"})
    while True:         # as the first process we get every orphan that the agent did not adopt
        pid, status = os.wait()
        if pid == agent.pid:
            sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    _run(*sys.argv[1:])
