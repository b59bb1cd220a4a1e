"""Network namespaces: entering one for a moment, making one, removing one, telling two apart.

Works on the files of network_namespaces(7): ``/run/netns/NAME`` (a bind mount, as ip-netns(8) makes
it) and ``/proc/PID/ns/net``. Called by katashim.resources.netlink to open its sockets inside a
sandbox's namespace, by katashim.resources.network, and by the undo stack (kind ``netns``).

Plain: no gevent. setns(2) changes the calling *thread* only, so code inside :class:`entered` must
neither switch greenlets nor last long: open sockets and devices there, use them afterwards. They keep
the namespace that they were made in.
"""

import ctypes
import errno
import os

from katashim.errors import FailedPrecondition, Internal, NotFound

NETNS_DIR = "/run/netns"        # where ip-netns(8) and the CNI plugins keep theirs

_OWN = "/proc/thread-self/ns/net"
_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


class entered:
    """This thread inside another network namespace, for a block that cannot switch greenlets.

    :param path: a namespace file, or None to stay where we are.
    :param inode: the inode number that the namespace must have, or None for any.
    :raises NotFound: there is no network namespace at `path`, or no longer the one with `inode`.
    :raises FailedPrecondition: it cannot be entered; says why.
    """

    def __init__(self, path, inode=None):
        self._path, self._inode = path, inode
        self._home = None

    def __enter__(self):
        if self._path is None:
            return self
        target = _open(self._path)
        try:
            if self._inode is not None and os.fstat(target).st_ino != self._inode:
                raise NotFound(f"{self._path} is not the network namespace {self._inode} any more")
            self._home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _call("setns", target, _CLONE_NEWNET)
            except OSError as exc:
                os.close(self._home)
                if exc.errno == errno.EINVAL:
                    raise NotFound(f"{self._path} is not a network namespace") from exc
                raise FailedPrecondition(
                    f"cannot enter the network namespace {self._path}: {exc.strerror}") from exc
        finally:
            os.close(target)
        return self

    def __exit__(self, kind, error, trace):
        if self._home is not None:
            try:
                _return_home(self._home)
            finally:
                os.close(self._home)
        return False


def identity(path):
    """What tells the namespace at `path` from all others that exist: ``(device, inode)``.

    :raises NotFound: nothing is there.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError) as exc:
        raise NotFound(f"there is no network namespace {path}") from exc
    return status.st_dev, status.st_ino


def is_own(path):
    """Whether `path` is the very namespace that this process runs in, which is the host's.

    :raises NotFound: nothing is there.
    """
    return identity(path) == identity(_OWN)


def create(path):
    """Make a network namespace that lives as long as it is bound to the file `path`.

    It has a loopback link, down, and nothing else. Takes milliseconds in the kernel.

    :raises FailedPrecondition: `path` exists, or the kernel refuses; says why.
    """
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
        home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call("unshare", _CLONE_NEWNET)
            try:
                _call("mount", _OWN.encode(), os.fsencode(path), b"none", _MS_BIND, None)
            finally:
                _return_home(home)
        finally:
            os.close(home)
    except OSError as exc:
        raise FailedPrecondition(f"cannot make the network namespace {path}: {exc.strerror}") from exc


def remove(path):
    """Unbind the namespace at `path` and delete its file; no error when there is nothing.

    The kernel frees the namespace and its links when its last process and socket are gone.

    :raises OSError: the file cannot be removed.
    """
    try:
        _call("umount2", os.fsencode(path), _MNT_DETACH)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):    # not a mount, not there
            raise
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        pass


def _open(path):
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError) as exc:
        raise NotFound(f"there is no network namespace {path}") from exc
    except OSError as exc:
        raise FailedPrecondition(f"cannot open the network namespace {path}: {exc.strerror}") from exc


def _return_home(home):
    try:
        _call("setns", home, _CLONE_NEWNET)
    except OSError as exc:
        raise Internal(f"a thread cannot get back to its network namespace: {exc.strerror}") from exc


def _call(name, *args):
    if getattr(_libc, name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
