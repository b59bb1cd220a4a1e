"""A private containerd: its own root, state and sockets, and nothing of the machine's.

Its PATH begins with the repository's bin/, so that ``io.containerd.katashim.v2`` is our shim. It is
started, killed and restarted by pid only. Any containerd from 1.6 on serves, also one out of another
Debian's tree (see trees.py).
"""

import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from typing import NamedTuple

from harness import image
from harness.terminal import Terminal

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
KATASHIM = "io.containerd.katashim.v2"
RUNC = "io.containerd.runc.v2"

_START_S = 20
_STOP_S = 20
_CTR_S = 60

# Plugins that need what a test machine may not have, or that would share things between daemons.
_DISABLED = (
    "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
    "io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing",
    "io.containerd.tracing.processor.v1.otlp", "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
)


class Result(NamedTuple):
    """How a program ended. `code` is its exit status, or minus the signal that killed it."""

    argv: tuple
    code: int
    out: str
    err: str
    seconds: float

    def __str__(self):
        return (f"{' '.join(self.argv)}\n  ended with {self.code} after {self.seconds:.2f} s\n"
                f"--- stdout:\n{self.out.rstrip()}\n--- stderr:\n{self.err.rstrip()}")


class Failed(AssertionError):
    """A program did not do as it should; the message has its output and the end of containerd's log."""


class Running:
    """A program that was started. :param log_tail: called for more evidence when it hangs."""

    def __init__(self, argv, env, stdin=False, log_tail=lambda: ""):
        self.argv, self._log_tail = argv, log_tail
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            argv, env=env, cwd="/", start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL)

    def wait(self, timeout_s=_CTR_S, stdin=None):
        """Give it its input (bytes) and wait for its end; returns a :class:`Result`.

        :raises Failed: it takes longer; it is killed then, as it is when this wait is interrupted.
        """
        try:
            return self._result(*self.process.communicate(stdin, timeout=timeout_s))
        except subprocess.TimeoutExpired:
            raise Failed(f"no end within {timeout_s} s\n{self.kill()}\n{self._log_tail()}") from None
        except BaseException:
            self.kill()
            raise

    def read_line(self, timeout_s=_CTR_S):
        """The next line that it prints on stdout, which :meth:`wait` then does not return.

        :raises Failed: there is none within `timeout_s` seconds, or at all; it is killed.
        """
        end = time.monotonic() + timeout_s
        line, stdout = b"", self.process.stdout.fileno()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], max(0, end - time.monotonic()))
            byte = os.read(stdout, 1) if ready else b""
            if not byte:
                raise Failed(f"no line, but {line!r}\n{self.kill()}\n{self._log_tail()}")
            line += byte
        return line.decode(errors="replace")

    def kill(self):
        """Kill it; returns its :class:`Result` so far."""
        self.process.kill()
        return self._result(*self.process.communicate())

    def _result(self, out, err):
        return Result(tuple(self.argv), self.process.returncode, out.decode(errors="replace"),
                      err.decode(errors="replace"), time.monotonic() - self._began)


class Containerd:
    """A containerd below `directory`, which is made when it is None and removed by :meth:`close`.

    :param config: katashim's configuration for its containers: the text of a ``.conf`` file.
    :param env: more of the environment, for containerd and so for the shims.
    :param command/ctr_command: the programs, as argument lists; another version's, see trees.py.
    :param path: directories to put before PATH, behind our bin/.
    :param plugins: containerd's configuration below the top, TOML text.
    """

    def __init__(self, directory=None, *, config="", env=None, command=("containerd",),
                 ctr_command=("ctr",), path=(), plugins=""):
        self._own_directory = directory is None
        self.directory = directory or tempfile.mkdtemp(prefix="katashim-", dir="/run")
        self.address = os.path.join(self.directory, "c.sock")
        self.root = os.path.join(self.directory, "root")
        self.state = os.path.join(self.directory, "state")
        self.log_path = os.path.join(self.directory, "containerd.log")
        self.config_path = os.path.join(self.directory, "katashim.conf")
        self.command, self._ctr_command = list(command), list(ctr_command)
        self.process = None
        self.env = {**os.environ, "KATA_CONF_FILE": self.config_path, **(env or {})}
        self.env["PATH"] = os.pathsep.join(
            [os.path.join(REPOSITORY, "bin"), *path, self.env.get("PATH", os.defpath)])
        self._write(self.config_path, config)
        self._toml = os.path.join(self.directory, "config.toml")
        self._plugins = plugins
        # The snapshotter is passed to ctr by its environment, so that no command line names it.
        self.env["CONTAINERD_SNAPSHOTTER"] = "overlayfs"

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.close()

    # -- life -------------------------------------------------------------------------------------
    def version(self):
        """The version as a tuple of numbers: (1, 6, 20)."""
        text = subprocess.run([*self.command, "--version"], check=True, capture_output=True, text=True,
                              timeout=_START_S).stdout
        return tuple(map(int, re.search(r" v?(\d+)\.(\d+)\.(\d+)", text).groups()))

    def start(self):
        """Start it and wait until it answers. :raises Failed: with its log."""
        modern = self.version() >= (2, 0, 0)
        disabled = ", ".join(f'"{plugin}"' for plugin in _DISABLED)
        self._write(self._toml, f"""version = {3 if modern else 2}
root = "{self.root}"
state = "{self.state}"
disabled_plugins = [{disabled}]
[grpc]
  address = "{self.address}"
[ttrpc]
  address = "{self.address}.ttrpc"
[debug]
  level = "debug"
{self._plugins}
""")
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--config", self._toml], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self.env, cwd="/", start_new_session=True)
        end = time.monotonic() + _START_S
        # ctr itself is patient with a socket that is not there; a dead containerd is found sooner here.
        while not os.path.exists(self.address) or self.ctr("version", check=False).code != 0:
            if self.process.poll() is not None:
                raise Failed(f"containerd ended with {self.process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > end:
                raise Failed(f"containerd does not answer after {_START_S} s:\n{self.log_tail()}")
            time.sleep(0.02)

    def stop(self):
        """SIGTERM and wait. Shims and containers live on. Any number of times."""
        self._signal(signal.SIGTERM)

    def kill9(self):
        """SIGKILL, as a crash."""
        self._signal(signal.SIGKILL)

    def _signal(self, number):
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(_STOP_S)
            raise Failed(f"containerd did not end {_STOP_S} s after signal {number}") from None
        finally:
            self.process = None

    def restart(self):
        """Stop it and start it again on the same state."""
        self.stop()
        self.start()

    def remove_all(self):
        """Kill and delete every container, by ctr; for the end of a test that failed. Returns their ids."""
        found = self.ctr("container", "ls", "-q", check=False).out.split()
        for name in found:
            self.ctr("task", "kill", "-s", "SIGKILL", "-a", name, check=False)
        for name in found:
            self.ctr("task", "rm", "-f", name, check=False)
            self.ctr("container", "rm", name, check=False)
        return found

    def close(self):
        """End it with all its containers, and remove its directory if it made it."""
        try:
            if self.process is not None and self.process.poll() is None:
                self.remove_all()
            self.stop()
        finally:
            if self._own_directory:
                self._remove_directory()

    def _remove_directory(self):
        """Delete the directory; what is still mounted below it stays, and fails the leak check."""
        with open("/proc/self/mountinfo") as table:
            mounted = any(line.split()[4].startswith(self.directory + "/") for line in table)
        if not mounted:
            shutil.rmtree(self.directory)

    # -- ctr --------------------------------------------------------------------------------------
    def ctr(self, *arguments, check=True, timeout_s=_CTR_S, stdin=None, code=0):
        """Run ctr to its end.

        :param arguments: behind the address. :param timeout_s: seconds; it is killed when they are over.
        :param check: whether an exit status other than `code` is an error. :param stdin: bytes, or None.
        :returns: :class:`Result`. :raises Failed: with its output and the end of containerd's log.
        """
        running = self.start_ctr(*arguments, stdin=stdin is not None)
        result = running.wait(timeout_s, stdin)
        if check and result.code != code:
            raise Failed(f"{result}\n{self.log_tail()}")
        return result

    def start_ctr(self, *arguments, stdin=False):
        """Run ctr without waiting for its end; returns :class:`Running`. :param stdin: whether it gets any."""
        return Running(self.ctr_argv(*arguments), self.env, stdin, self.log_tail)

    def ctr_argv(self, *arguments):
        """The command line of ctr, for those who run it themselves (with :attr:`env`)."""
        return [*self._ctr_command, "--address", self.address, *arguments]

    def import_busybox(self, **options):
        """Make the busybox image and import it; returns its name. `options` are image.write's."""
        archive = image.write(os.path.join(self.directory, "image.tar"), **options)
        self.ctr("image", "import", archive)
        os.unlink(archive)
        return options.get("name", image.NAME)

    def run(self, name, *command, options=(), runtime=KATASHIM, image_name=image.NAME, **how):
        """``ctr run`` of `command` in a container called `name`; `how` goes to :meth:`ctr`."""
        return self.ctr(*self._run_words(options, runtime), image_name, name, *command, **how)

    def start_run(self, name, *command, options=(), runtime=KATASHIM, image_name=image.NAME, stdin=False):
        """The same without waiting for its end; returns :class:`Running`."""
        return self.start_ctr(*self._run_words(options, runtime), image_name, name, *command, stdin=stdin)

    def _run_words(self, options, runtime):
        # A ctr that is killed leaves its FIFOs behind; in this place close() removes them.
        return "run", *options, "--fifo-dir", os.path.join(self.directory, "fifo"), "--runtime", runtime

    def wait_status(self, name, wanted, timeout_s=_CTR_S):
        """Wait until the task of a container is `wanted`, such as "RUNNING".

        :raises Failed: it is not in time; says what it is.
        """
        end = time.monotonic() + timeout_s
        while (status := self.tasks().get(name, (0, "absent"))[1]) != wanted:
            if time.monotonic() > end:
                raise Failed(f"{name} is {status}, not {wanted}, after {timeout_s} s\n{self.log_tail()}")
            time.sleep(0.02)

    def tasks(self):
        """``{container id: (pid, "RUNNING" | "STOPPED" | ...)}``."""
        lines = self.ctr("task", "ls").out.splitlines()[1:]
        return {name: (int(pid), status) for name, pid, status in (line.split() for line in lines)}

    def terminal(self, *arguments, rows=24, columns=80):
        """Run ctr on a terminal of its own; see :class:`harness.terminal.Terminal`."""
        return Terminal(self.ctr_argv(*arguments), self.env, rows, columns)

    def traces(self):
        """Directories in which a deleted container must leave nothing, for leaks.snapshot."""
        return self.state, os.path.join(self.root, "io.containerd.runtime.v2.task")

    def log_tail(self, lines=40):
        """The end of containerd's log, which has the shims' records too."""
        try:
            with open(self.log_path, errors="replace") as log:
                return "--- containerd's log:\n" + "".join(log.readlines()[-lines:])
        except FileNotFoundError:
            return ""

    @staticmethod
    def _write(path, text):
        with open(path, "w") as file:
            file.write(text)
