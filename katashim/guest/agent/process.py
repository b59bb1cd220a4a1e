"""A process of a container: its stdio, as the agent's Read, Write and Close calls see it, and its end.

The contract with the host (upstream's agent keeps it, and hosts depend on it):

* A read waits for at least one byte; no bytes means the end of the stream.
* Whatever was written before the process ended can be read before the end is seen. When a grandchild
  still holds the pipe, the stream ends 500 ms after the process did, counted from the last byte.
* On a terminal both streams are the terminal, and its end is the error EIO.

Called by container.py and services.py.
"""

import fcntl
import os
import select
import struct
import threading

from katashim.guest.agent.rpcerror import INTERNAL, UNAVAILABLE, RpcError

DRAIN_MS = 500
_READ_LIMIT = (4 << 20) - 4096      # of one answer: a ttRPC message has 4 MiB
_TIOCSWINSZ, _F_SETPIPE_SZ = 0x5414, 1031


class Stdio:
    """The agent's ends of a process's stdio: pipes, or one terminal.

    :ivar child: the three fds that become 0 to 2 of the process, until :meth:`started`.
    """

    def __init__(self, pipe_size=0):
        """Three pipes. :param pipe_size: of each, in bytes, 0 = the kernel's."""
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        if pipe_size:
            for reading, _ in pipes:
                fcntl.fcntl(reading, _F_SETPIPE_SZ, pipe_size)
        (stdin_read, stdin_write), (stdout_read, stdout_write), (stderr_read, stderr_write) = pipes
        self.child = (stdin_read, stdout_write, stderr_write)
        self.terminal = None
        self.stdin = _Stream(stdin_write)
        self.stdout, self.stderr = _Stream(stdout_read), _Stream(stderr_read)

    def started(self):
        """The process has its ends: close ours of them, or its end would never be seen."""
        child, self.child = self.child, ()
        for fd in child:
            os.close(fd)

    def become_terminal(self, master):
        """Replace the pipes by the terminal whose master side is `master`."""
        self.started()
        self.close()
        self.terminal = _Stream(master)
        self.stdin = self.stdout = self.stderr = self.terminal

    def close_stdin(self):
        """End of input. A terminal stays: its other half is still read, and closing it would hang up."""
        if self.terminal is None:
            self.stdin.close()

    def close(self):
        """Close all. A read that is under way ends by its own rules first."""
        for stream in (self.stdin, self.stdout, self.stderr):
            stream.close()


class Process:
    """A process that has been started.

    :ivar end: its reaper.Exit. :ivar pid: in the guest. :ivar stdio: a :class:`Stdio`.
    """

    def __init__(self, end, stdio):
        self.end, self.pid, self.stdio = end, end.pid, stdio

    def read_stdout(self, size):
        """The next bytes, at most `size`; none at the end."""
        return self.stdio.stdout.read(size, self.end)

    def read_stderr(self, size):
        """As :meth:`read_stdout`."""
        return self.stdio.stderr.read(size, self.end)

    def write_stdin(self, data):
        """Write all of `data`; nothing means the end of input."""
        if data:
            self.stdio.stdin.write(data, self.end)
        else:
            self.stdio.close_stdin()
        return len(data)

    def resize(self, rows, columns):
        """Set the terminal's size in characters. :raises RpcError: there is no terminal."""
        if self.stdio.terminal is None:
            raise RpcError(UNAVAILABLE, '"no tty"')
        self.stdio.terminal.resize(rows, columns)

    def signal(self, number):
        """Send a signal; none to a process that has ended, which is no error."""
        if self.end.status is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass

    def close(self):
        """Release what it holds; it must have ended."""
        self.stdio.close()


class _Stream:
    """One of our ends: an fd that some threads use and others close, without ever meeting a recycled number:
    it is really closed when the last of its users is done."""

    def __init__(self, fd):
        os.set_blocking(fd, False)
        self._fd = fd
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._users = 0
        self._closing = False
        self._lock = threading.Lock()       # guards _fd, _users and _closing

    def read(self, size, end):
        with self._reading, self._use() as fd:
            return self._read(fd, min(size, _READ_LIMIT), end)

    def write(self, data, end):
        with self._writing, self._use() as fd:
            left = memoryview(data)
            while left:
                try:
                    left = left[os.write(fd, left):]
                except BlockingIOError:
                    self._wait_writable(fd, end)

    def resize(self, rows, columns):
        with self._use() as fd:
            fcntl.ioctl(fd, _TIOCSWINSZ, struct.pack("<HHHH", rows, columns, 0, 0))

    def close(self):
        with self._lock:
            self._closing = True
            self._close_if_unused()

    def _read(self, fd, size, end):
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if end.status is None:
            poller.register(end.fd, select.POLLIN)
        while True:
            try:
                return os.read(fd, size)
            except BlockingIOError:
                pass
            if end.status is None:
                poller.poll()
                continue
            last = select.poll()
            last.register(fd, select.POLLIN)
            if not last.poll(DRAIN_MS):
                return b""

    def _wait_writable(self, fd, end):
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        if end.status is None:
            poller.register(end.fd, select.POLLIN)
            poller.poll()
        elif not poller.poll(DRAIN_MS):
            raise BrokenPipeError(32, "Broken pipe")

    def _use(self):
        return _Use(self)

    def _close_if_unused(self):
        if self._closing and self._users == 0 and self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class _Use:
    """A stream's fd for the length of a block."""

    def __init__(self, stream):
        self._stream = stream

    def __enter__(self):
        stream = self._stream
        with stream._lock:
            if stream._closing:
                raise RpcError(INTERNAL, "cannot get stream reader")
            stream._users += 1
            return stream._fd

    def __exit__(self, *error):
        stream = self._stream
        with stream._lock:
            stream._users -= 1
            stream._close_if_unused()
        return False
