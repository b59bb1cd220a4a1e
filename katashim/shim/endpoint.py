"""The shim's socket: where it is, who listens on it, and taking it over from a dead shim.

``unix:///run/containerd/s/<sha256 of "address/namespace/id">``, as containerd's own helper computes
it, so that a second ``start`` for the same sandbox finds the first. Part of the start path: only C
builtins are imported.
"""

import _socket
import posix
import sys
from errno import EADDRINUSE
from time import monotonic, sleep

from katashim.errors import DeadlineExceeded, InvalidArgument, KatashimError

DEFAULT_DIR = "/run/containerd/s"
_PATH_MAX_BYTES = 107           # sockaddr_un.sun_path without its final NUL
_LOCK_TIMEOUT_S = 5
_BACKLOG = 1024


def directory(params=None):
    """The directory of the sockets: $KATASHIM_SOCKET_DIR, else what containerd asks for, else its default.

    :param params: :class:`katashim.shim.bootstrap.Params` or None.
    """
    chosen = posix.environ.get(b"KATASHIM_SOCKET_DIR", b"").decode() or (params and params.socket_dir)
    if chosen and not chosen.startswith("/"):
        raise InvalidArgument(f"the socket directory {chosen!r} is not an absolute path")
    return chosen or DEFAULT_DIR


def socket_path(folder, address, namespace, sandbox_id):
    """The path of a sandbox's socket in `folder`.

    :param address: containerd's own socket, for two containerds may use the same ids.
    :raises InvalidArgument: the path is longer than the kernel allows.
    """
    parts = [part for part in (address, namespace, sandbox_id) if part]
    path = _clean(f"{folder}/{_sha256(_clean('/'.join(parts)).encode())}")
    if len(path.encode()) > _PATH_MAX_BYTES:
        raise InvalidArgument(f"the socket path {path} has {len(path.encode())} bytes, the kernel allows "
                              f"{_PATH_MAX_BYTES}: choose a shorter directory than {folder}")
    return path


def accepts(path):
    """Whether somebody listens on the socket at `path`. Never waits: a full backlog is somebody, too."""
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.setblocking(False)
        probe.connect(path)
    except BlockingIOError:
        return True
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        return False
    finally:
        probe.close()
    return True


def listen(path):
    """Listen on `path`; a socket there that nobody listens on is replaced.

    The directory is locked meanwhile: between another's bind and listen its socket looks dead.

    :returns: the listening ``_socket.socket``, or None when a shim already serves the sandbox.
    :raises KatashimError: the directory cannot be made or the socket not be bound.
    """
    folder = path.rpartition("/")[0] or "/"
    try:
        _make_dirs(folder)
        lock = posix.open(folder, posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
        try:
            _lock(lock, folder)
            return _bind(path)
        finally:
            posix.close(lock)
    except OSError as exc:
        raise KatashimError(f"cannot listen on {path}: {exc.strerror or exc}") from exc


def identity(path):
    """``(device, inode)`` of the socket at `path`, to be handed to :func:`remove`; None if it is gone."""
    try:
        found = posix.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def remove(path, known):
    """Remove the socket at `path` if it still is the one whose :func:`identity` was `known`."""
    if known is not None and identity(path) == known:
        posix.unlink(path)


def _bind(path):
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        try:
            sock.bind(path)
        except OSError as exc:
            if exc.errno != EADDRINUSE:
                raise
            if accepts(path):
                sock.close()
                return None
            posix.unlink(path)
            sock.bind(path)
        posix.chmod(path, 0o600)                # before listen: until then nobody can connect
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _lock(fd, folder):
    from fcntl import LOCK_EX, LOCK_NB, flock
    end = monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            return flock(fd, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            if monotonic() > end:
                raise DeadlineExceeded(
                    f"nothing after {_LOCK_TIMEOUT_S} s while waiting for the lock on {folder}") from None
            sleep(0.001)


def _make_dirs(path):
    try:
        posix.mkdir(path, 0o711)
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_dirs(path.rpartition("/")[0] or "/")
        _make_dirs(path)


def _clean(path):
    """Go's filepath.Join removes doubled slashes; nothing else can occur in an address."""
    while "//" in path:
        path = path.replace("//", "/")
    return path


def _sha256(data):
    if sys.version_info >= (3, 12):
        from _sha2 import sha256
    else:
        from _sha256 import sha256
    return sha256(data).hexdigest()
