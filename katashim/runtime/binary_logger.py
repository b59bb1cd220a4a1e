"""A logging program that takes a container's output: ``binary:///path/of/program?key=value``.

containerd's protocol (its ``cio.BinaryIO``; nerdctl and Fargate's loggers speak it): the program gets
stdout on descriptor 3, stderr on 4, and on 5 a pipe that it closes, or writes a byte to, when it is
ready; its arguments are the keys and values of the query, its whole environment CONTAINER_ID and
CONTAINER_NAMESPACE. It ends when both streams end. Used by katashim.runtime.stdio.
"""

import fcntl
import logging
import os
import signal

from gevent import get_hub

from katashim import green
from katashim.child import Child
from katashim.errors import InvalidArgument

log = logging.getLogger(__name__)

_READY_S = 10
_FIRST_BREATH_S = 0.2       # to see a program that fails at once, which looks like one that is ready
_ABOVE = 10                 # our copies of its descriptors stay clear of 3, 4 and 5


class BinaryLogger:
    """A running logging program.

    :param uri: as above. :param container_id, namespace: for its environment.
    :param stop_s: seconds it gets to end once its streams have ended, and again after SIGTERM.
    :ivar stdout, stderr: descriptors to write to, non-blocking; whoever takes them closes them.
    :raises InvalidArgument: the URI is bad, or the program cannot be executed.
    """

    def __init__(self, uri, container_id, namespace, stop_s):
        path, arguments = _parse(uri)
        self._path, self._stop_s = path, stop_s
        self.stdout, self.stderr, self._ready = -1, -1, -1
        theirs = []
        try:
            reader, self.stdout = _pipe(theirs)
            errors, self.stderr = _pipe(theirs)
            self._ready, ready = _pipe(theirs, ours_reads=True)
            environment = {"CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace}
            pid = _execute(path, [path, *arguments], environment, {3: reader, 4: errors, 5: ready})
        except OSError as exc:
            self._close_ours()
            raise InvalidArgument(f"cannot start the logging program {path}: {exc.strerror}") from exc
        finally:
            for fd in theirs:
                os.close(fd)
        self._child = Child(_Started(pid), f"logging program {path}")

    def wait_ready(self):
        """Wait until the program says that it is ready; one that does not is ended.

        :raises DeadlineExceeded: it does not, for 10 s. :raises InvalidArgument: it failed instead.
        """
        try:
            self._wait_ready()
        except BaseException:
            self._child.stop()
            raise

    def _wait_ready(self):
        hub = get_hub()
        watcher = hub.loop.io(self._ready, 1)
        try:
            with green.deadline(_READY_S, f"the logging program {self._path} to be ready"):
                hub.wait(watcher)
            said = os.read(self._ready, 1)
        finally:
            watcher.close()
            os.close(self._ready)
            self._ready = -1
        if not said and self._child.wait(_FIRST_BREATH_S) not in (None, 0):
            raise InvalidArgument(f"the logging program {self._path} {self._child.ending()} at once")

    def finish(self):
        """Wait for its end, for its streams have ended; make it end when that takes too long."""
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1
        if self._child.wait(self._stop_s) is None:
            log.warning("the %s has not ended %g s after its input did", self._child.name, self._stop_s)
            self._child.stop(self._stop_s)

    def _close_ours(self):
        for fd in (self.stdout, self.stderr, self._ready):
            if fd >= 0:
                os.close(fd)


class _Started:
    """What :class:`katashim.child.Child` wants to know of a process that was started here."""

    def __init__(self, pid):
        self.pid, self.returncode = pid, None


def _parse(uri):
    from urllib.parse import parse_qsl, unquote, urlsplit
    parts = urlsplit(uri)
    if not parts.path.startswith("/"):
        raise InvalidArgument(f"{uri!r} names no program by its absolute path")
    arguments = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        arguments.setdefault(key, value)        # of a key given twice, the first value
    return unquote(parts.path), [word for pair in arguments.items() for word in pair]


def _pipe(theirs, ours_reads=False):
    """``(read fd, write fd)``; our end is non-blocking, theirs is put on the list and clear of 0 to 9."""
    ends = list(os.pipe())
    ours, other = (0, 1) if ours_reads else (1, 0)
    moved = fcntl.fcntl(ends[other], fcntl.F_DUPFD_CLOEXEC, _ABOVE)
    os.close(ends[other])
    ends[other] = moved
    theirs.append(moved)
    os.set_blocking(ends[ours], False)
    return ends


def _execute(path, argv, environment, descriptors):
    """Start a program with `descriptors` {its number: ours}, /dev/null for stdio, its own session."""
    actions = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
    actions += [(os.POSIX_SPAWN_DUP2, ours, number) for number, ours in descriptors.items()]
    return os.posix_spawn(path, argv, environment, file_actions=actions, setsid=True, setsigmask=[],
                          setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])
