"""The host's ends of a process's stdin, stdout and stderr, and the loops that copy to and from the guest.

containerd names them in CreateTask and Exec: the path of a FIFO (also as ``fifo://``), ``binary://``
for a logging program (katashim.runtime.binary_logger), ``file://`` for a file, "" for none.

A FIFO is a meeting of two who come and go, so the shim keeps the other side of each open itself:

* of an output, the reading side. Opening the writing side does not wait for a client then, and a
  client may detach: what is written until it attaches again waits in the pipe, and when the pipe is
  full the process waits, as it would on a terminal that nobody reads. At the end of the output the
  writing side stays open until a client has it open too: the kernel lets nobody open a FIFO for
  reading that has no writer, so a client that comes late would wait for ever.
* of stdin, the writing side. Until a client opens it, and after one has detached, reading would
  otherwise return the end of file. CloseIO drops it; then the end comes when the client closes.

Every descriptor is non-blocking: a greenlet that must wait does so in the loop, and
:meth:`Stdio.close` wakes it. Used by katashim.runtime.process.
"""

import errno
import logging
import os
import stat
from contextlib import ExitStack

from gevent import get_hub
from gevent.event import Event

from katashim import green
from katashim.errors import Cancelled, InvalidArgument, KatashimError, NotFound

log = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 1024         # what a pipe holds, in the guest and here
_READABLE, _WRITABLE = 1, 2     # the loop's event bits
_FILE_S = 60                    # for one write to a disk
_LATE_READER_S = 0.05           # between two looks for it, at first
_LATE_READER_MAX_S = 1.0
_OPEN = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def open_stdio(stdin, stdout, stderr, terminal, *, container_id, exec_id="", namespace="", logger_stop_s=12):
    """Open what containerd named; returns :class:`Stdio`. Never waits for the other side of a FIFO.

    :param stdin: "", a path or ``fifo://``. :param stdout, stderr: these, ``binary://`` or ``file://``.
    :param terminal: with a terminal all output is stdout; `stderr` is not opened.
    :param namespace: containerd's, for a logging program; and `exec_id` for the log.
    :param logger_stop_s: seconds that a logging program gets to end by itself, and again after SIGTERM.
    :raises NotFound: there is no such FIFO. :raises InvalidArgument: a URI of another kind.
    :raises KatashimError: it cannot be opened, or the logging program does not start.
    """
    stdio = Stdio(f"{container_id}/{exec_id}" if exec_id else container_id)
    try:
        stdio._stdin = _open_stdin(stdin)
        if stdout.startswith("binary:"):        # one program takes both
            stdio._add_logger(stdout, container_id, namespace, logger_stop_s)
            return stdio
        stdio.stdout = _open_sink(stdout)
        if not terminal and stderr.startswith("binary:"):
            stdio._add_logger(stderr, container_id, namespace, logger_stop_s, stderr_only=True)
        elif not terminal:
            stdio.stderr = _open_sink(stderr)
    except BaseException:
        stdio.close()
        raise
    return stdio


class Stdio:
    """The three streams of one process.

    :ivar stdout, stderr: where its output goes: ``write(data)``, then ``end()``.
    """

    def __init__(self, name):
        self._name = name
        self._stdin = None
        self._logger = None
        self.stdout = self.stderr = Nowhere()

    def __repr__(self):
        return f"<stdio of {self._name}>"

    @property
    def has_stdin(self):
        """Whether containerd gave it a stdin at all."""
        return self._stdin is not None

    def read_stdin(self, max_bytes=CHUNK_BYTES):
        """What the client has typed, as soon as there is something; b"" at the end of file.

        :raises Cancelled: :meth:`close` was called meanwhile.
        """
        return b"" if self._stdin is None else self._stdin.read(max_bytes)

    def unread(self):
        """Whether an output is held up with no client there to read it.

        The end of a process is reported after its last byte, but it need not wait for a client that
        has detached and may never come back.
        """
        return self.stdout.unread() or self.stderr.unread()

    def close_stdin(self):
        """CloseIO: the end of file comes when no client holds the FIFO open for writing any more."""
        if self._stdin is not None:
            self._stdin.drop_keeper()

    def close(self):
        """Close all of it, wake those who wait with :class:`Cancelled`, and end a logging program in
        bounded time. Idempotent."""
        logger, self._logger = self._logger, None
        with ExitStack() as each:       # last in, first out, and the others even when one fails
            if logger is not None:
                each.callback(logger.finish)
            each.callback(self.stderr.close)
            each.callback(self.stdout.close)
            if self._stdin is not None:
                each.callback(self._stdin.close)

    def _add_logger(self, uri, container_id, namespace, stop_s, stderr_only=False):
        from katashim.runtime.binary_logger import BinaryLogger
        self._logger = logger = BinaryLogger(uri, container_id, namespace, stop_s)
        self.stderr = Pipe(logger.stderr)
        if stderr_only:
            os.close(logger.stdout)
        else:
            self.stdout = Pipe(logger.stdout)
        logger.wait_ready()


# -- the copy loops -------------------------------------------------------------------------------
def copy_out(read, sink, what):
    """Copy from the guest until the stream ends, then end `sink`.

    A sink that fails (its disk is full, the logging program died) is no reason to stop reading: the
    process would hang on its next write. What it writes from then on is dropped, and counted.

    :param read: ``read()`` returns the next bytes, b"" at the end. :param what: for the log.
    :returns: how many bytes were copied.
    :raises KatashimError: what `read` raises; the sink is ended then, too.
    """
    copied = dropped = 0
    error = None
    try:
        while data := read():
            if error is None:
                try:
                    sink.write(data)
                    copied += len(data)
                    continue
                except Cancelled:
                    return copied
                except (OSError, KatashimError) as exc:
                    error = exc
            dropped += len(data)
    finally:
        if error is not None:
            log.warning("%s cannot be written (%s): %d bytes are lost", what, error, dropped)
        sink.end()
    return copied


def copy_in(stdio, write, end):
    """Copy the client's stdin to the guest until its end, and then tell the guest that it has ended.

    :param write: ``write(data)`` hands bytes to the guest. :param end: ``end()`` closes stdin there.
    :raises KatashimError: what `write` and `end` raise.
    """
    try:
        while data := stdio.read_stdin():
            write(data)
    except Cancelled:
        return
    end()


# -- outputs --------------------------------------------------------------------------------------
class Nowhere:
    """An output that containerd did not ask for."""

    def write(self, data):
        """Drop `data`."""

    def unread(self):
        """Nothing is held up here."""
        return False

    def end(self):
        """Nobody to tell."""

    def close(self):
        """Nothing to close."""


class Pipe:
    """The pipe of a logging program. :param fd: its writing side, non-blocking; owned from now on."""

    def __init__(self, fd):
        self._end = _Descriptor(fd, _WRITABLE)

    def write(self, data):
        """Write all of `data`; waits while the reader is slow or away.

        :raises Cancelled: it was closed meanwhile. :raises OSError: the reader is gone for good.
        """
        rest = memoryview(data)
        while rest:
            fd = self._end.fd()
            try:
                rest = rest[os.write(fd, rest):]
            except BlockingIOError:
                self._end.wait()

    def unread(self):
        """A logging program that does not read is not away: its end breaks the pipe."""
        return False

    def end(self):
        """There is no more: end of file for the reader, once it has read what is in the pipe."""
        self._end.close()

    def close(self):
        """Close it now. Wakes a waiting writer. Idempotent."""
        self._end.close()


class Fifo(Pipe):
    """A FIFO whose reader may come and go.

    :param fd: its writing side, :param keeper: its reading side, both non-blocking and owned from now on.
    """

    def __init__(self, fd, keeper):
        super().__init__(fd)
        self._keeper = keeper
        self._closed = Event()

    def unread(self):
        """Whether a writer waits and there is no client that reads."""
        if self._keeper is None or not self._end.waited_for():
            return False
        # Our own reading side would be counted. What is in the pipe stays while the writing side is open.
        self._drop_keeper()
        absent = not self._has_reader()
        self._keeper = os.open(f"/proc/self/fd/{self._end.fd()}", os.O_RDONLY | _OPEN)
        return absent

    def end(self):
        """End of file for the reader; for one that is not there yet, as soon as it comes."""
        if not self._closed.is_set() and self._keeper is not None:
            self._drop_keeper()
            if self._has_reader():
                self._end.close()
            else:
                green.spawn("end of output", self._await_reader)

    def close(self):
        """Close it now; what nobody has read is gone. Wakes a waiting writer. Idempotent."""
        self._closed.set()
        self._end.close()
        self._drop_keeper()

    def _await_reader(self):
        pause_s = _LATE_READER_S
        while not self._closed.wait(pause_s):
            if self._has_reader():
                self._end.close()
                return
            pause_s = min(2 * pause_s, _LATE_READER_MAX_S)

    def _has_reader(self):
        """Whether a client has it open for reading; the kernel tells by refusing one more writer."""
        try:
            os.close(os.open(f"/proc/self/fd/{self._end.fd()}", os.O_WRONLY | _OPEN))
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            return False
        return True

    def _drop_keeper(self):
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            os.close(keeper)


class File:
    """A file that output is appended to. A disk may make its writers wait: written in a native thread."""

    def __init__(self, path):
        self._path = path
        self._fd = green.in_thread(_open_file, path, what=f"opening {path}")

    def write(self, data):
        """Append all of `data`. :raises Cancelled: closed. :raises OSError: the disk is full, or worse."""
        if self._fd is None:
            raise _closed()
        green.in_thread(_write_all, self._fd, data, what=f"writing to {self._path}", timeout_s=_FILE_S)

    def unread(self):
        """Nothing is held up here but by the disk."""
        return False

    def end(self):
        """There is no more."""
        self.close()

    def close(self):
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            green.in_thread(os.close, fd, what=f"closing {self._path}", timeout_s=_FILE_S)


def _open_sink(uri):
    if not uri:
        return Nowhere()
    scheme, path = split_uri(uri)
    if scheme == "file":
        try:
            return File(path)
        except OSError as exc:
            raise InvalidArgument(f"cannot open {path} for output: {exc.strerror}") from exc
    if scheme != "fifo":
        raise InvalidArgument(f"output cannot go to {uri!r}: a FIFO, binary:// or file:// is needed")
    keeper = _open(path, os.O_RDONLY)
    try:
        fd = _open(path, os.O_WRONLY | os.O_APPEND)
    except BaseException:
        os.close(keeper)
        raise
    if stat.S_ISFIFO(os.fstat(keeper).st_mode):
        return Fifo(fd, keeper)
    os.close(keeper)                # a terminal, /dev/null: nobody to meet there
    return Pipe(fd)


def _open_file(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)


def _write_all(fd, data):
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest):]


# -- stdin ----------------------------------------------------------------------------------------
class _Stdin:
    """The reading side of stdin's FIFO, and the writing side that keeps it from ending."""

    def __init__(self, fd, keeper):
        self._end = _Descriptor(fd, _READABLE)
        self._keeper = keeper

    def read(self, max_bytes):
        while True:
            fd = self._end.fd()
            try:
                return os.read(fd, max_bytes)
            except BlockingIOError:
                self._end.wait()
            except OSError as exc:
                if exc.errno == errno.EIO:          # the other end of a terminal is gone
                    return b""
                raise

    def drop_keeper(self):
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            os.close(keeper)

    def close(self):
        self._end.close()
        self.drop_keeper()


def _open_stdin(uri):
    if not uri:
        return None
    scheme, path = split_uri(uri)
    if scheme != "fifo":
        raise InvalidArgument(f"stdin cannot come from {uri!r}: a FIFO is needed")
    fd = _open(path, os.O_RDONLY)
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return _Stdin(fd, None)
    try:
        return _Stdin(fd, _open(path, os.O_WRONLY))
    except BaseException:
        os.close(fd)
        raise


# -- descriptors ----------------------------------------------------------------------------------
class _Descriptor:
    """A non-blocking descriptor that one greenlet at a time waits for, and another may close."""

    def __init__(self, fd, events):
        self._fd, self._events = fd, events
        self._watcher = None

    def fd(self):
        """The descriptor. :raises Cancelled: it has been closed."""
        if self._fd is None:
            raise _closed()
        return self._fd

    def wait(self):
        """Wait until it is readable or writable. :raises Cancelled: it was closed meanwhile."""
        hub = get_hub()
        if self._watcher is None:
            self._watcher = hub.loop.io(self._fd, self._events)
        hub.wait(self._watcher)

    def waited_for(self):
        """Whether a greenlet waits for it."""
        return self._watcher is not None and self._watcher.active

    def close(self):
        """Close it; who waits for it gets :class:`Cancelled`. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        watcher, self._watcher = self._watcher, None
        # The loop must let go of the descriptor before its number can be given to another.
        get_hub().cancel_waits_close_and_then([watcher], _closed(), os.close, fd)


def _closed():
    return Cancelled("the stream was closed by the shim")


def split_uri(uri):
    """``(scheme, path)`` of a stream's name; a plain path is a ``fifo``."""
    if "://" not in uri:
        return "fifo", uri
    from urllib.parse import unquote, urlsplit
    parts = urlsplit(uri)
    if not parts.path.startswith("/"):
        raise InvalidArgument(f"{uri!r} names no absolute path")
    return parts.scheme, unquote(parts.path)


def _open(path, flags):
    try:
        return os.open(path, flags | _OPEN)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise NotFound(f"there is no FIFO {path}") from exc
    except OSError as exc:
        raise KatashimError(f"cannot open {path}: {exc.strerror}") from exc
