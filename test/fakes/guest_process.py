"""A process of the fake guest: a program of the host with the agent's streams around it."""

import fcntl
import os
import signal
import struct
import termios

import gevent
from gevent import get_hub
from gevent.event import Event

from katashim import child, errors

_DRAIN_S = 0.5              # how long after a process's end its output is still read (Kata's agent)
_HOLD = 'kill -STOP $$; exec "$@"'
_HELD_S = 10
_LOOK_S = 0.002


class Stream:
    """An output of a process. :param fd: readable, owned from now on. :param over: Event: no more is coming."""

    def __init__(self, fd, over):
        os.set_blocking(fd, False)
        self._fd, self._over = fd, over

    def read(self, size):
        """At least one byte, or b"" at the end."""
        while self._fd is not None:
            try:
                return os.read(self._fd, size)
            except BlockingIOError:
                if self._over.is_set():
                    return b""
                self._wait()
            except OSError as exc:      # a terminal whose other side is closed
                raise errors.Internal(f"{exc.strerror} (os error {exc.errno})") from exc
        return b""

    def _wait(self):
        readable, watcher = Event(), get_hub().loop.io(self._fd, 1)
        watcher.start(readable.set)
        try:
            gevent.wait([readable, self._over], count=1)
        finally:
            watcher.stop()
            watcher.close()

    def close(self):
        fd, self._fd = self._fd, None
        if fd is not None:
            self._over.set()
            os.close(fd)


class GuestProcess:
    """A running program.

    :param argv: list; argv[0] is a path. :param held: it waits for :meth:`release` before the program runs.
    :ivar exited: Event. :ivar status: exit status, or 128 + signal, once it has.
    """

    def __init__(self, argv, environment, directory, terminal, held):
        self.terminal = terminal
        self.exited, self._drained = Event(), Event()
        self._stdin = None
        self._held = held
        if held:
            argv = ["/bin/sh", "-c", _HOLD, "sh", *argv]
        self._start(argv, environment, directory)
        gevent.spawn(self._watch)
        if held:
            self._await_hold()

    def _start(self, argv, environment, directory):
        if self.terminal:
            ours, theirs = os.openpty()
            self._stdin, self.stdout, self.stderr = ours, Stream(ours, self._drained), None
            fds = [theirs] * 3
        else:
            reader, self._stdin = os.pipe()
            outputs = [os.pipe(), os.pipe()]
            self.stdout, self.stderr = (Stream(end, self._drained) for end, _ in outputs)
            fds = [reader, *(end for _, end in outputs)]
        os.set_blocking(self._stdin, False)
        try:
            self._child = child.spawn(argv, name=argv[0], env=environment, cwd=directory,
                                      stdin=fds[0], stdout=fds[1], stderr=fds[2])
        finally:
            for fd in set(fds):
                os.close(fd)

    def _await_hold(self):
        """Until it has stopped itself, as a real container waits on its exec.fifo."""
        with gevent.Timeout(_HELD_S):
            while not self.exited.is_set() and self._state() != "T":
                gevent.sleep(_LOOK_S)

    def _state(self):
        try:
            with open(f"/proc/{self._child.pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def _watch(self):
        self._child.exited.wait()
        status = self._child.returncode
        self.status = 128 - status if status < 0 else status
        self.exited.set()
        gevent.sleep(_DRAIN_S)
        self._drained.set()

    def release(self):
        """Let the program run."""
        self._held = False
        self._child.kill(signal.SIGCONT)

    def minds(self, number):
        """Whether the program has an opinion on a signal. One that is still held has none."""
        if self._held:
            return False
        with open(f"/proc/{self._child.pid}/status") as status:
            masks = dict(line.split(":", 1) for line in status)
        return any(int(masks[name], 16) >> (number - 1) & 1 for name in ("SigBlk", "SigIgn", "SigCgt"))

    def kill(self, number):
        """Send a signal; none when it has ended."""
        self._child.kill(number)

    def kill_group(self, number):
        """Send a signal to it and to all that it has started."""
        try:
            os.killpg(self._child.pid, number)
        except ProcessLookupError:
            pass

    def write_stdin(self, data):
        """Write all of `data`."""
        rest = memoryview(data)
        while rest:
            if self._stdin is None:
                raise errors.Internal("stdin is closed")
            try:
                rest = rest[os.write(self._stdin, rest):]
            except BlockingIOError:
                self._wait_writable()
            except OSError as exc:
                raise errors.Internal(f"{exc.strerror} (os error {exc.errno})") from exc

    def _wait_writable(self):
        writable, watcher = Event(), get_hub().loop.io(self._stdin, 2)
        watcher.start(writable.set)
        try:
            gevent.wait([writable, self.exited], count=1)
        finally:
            watcher.stop()
            watcher.close()

    def close_stdin(self):
        """The end of its input; of a terminal, the terminal's end."""
        fd, self._stdin = self._stdin, None
        if fd is not None and self.terminal:
            self.stdout.close()
        elif fd is not None:
            os.close(fd)

    def resize(self, rows, columns):
        """Set the size of its terminal."""
        fcntl.ioctl(self._stdin, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def forget(self):
        """Close its streams."""
        self._drained.set()
        self.close_stdin()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
