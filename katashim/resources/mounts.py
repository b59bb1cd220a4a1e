"""Mounts of this process's mount namespace: made, listed, unmade, and trees deleted around them.

Plain and blocking (no gevent): the daemon calls it through ``green.in_thread``, ``delete`` directly.
The undo kinds ``mount`` and ``tree`` (katashim.undo) are :func:`unmount` and :func:`remove_tree`.
The rule that all of it serves: nothing of the user's is ever removed. A bind is attached complete
and read-only from its first moment, never as a peer of the user's own mounts; a deletion asks the
kernel, directory by directory, not to cross a mount.

System calls: mount(2), umount2(2), open_tree(2), mount_setattr(2) and move_mount(2) (Linux 5.12),
openat2(2) (5.6). The mount table is proc(5)'s mountinfo.
"""

import ctypes
import errno
import os
import re
from typing import NamedTuple

from katashim.errors import FailedPrecondition, InvalidArgument, KatashimError, Unsupported

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_SYNCHRONOUS = 0x10
MS_REMOUNT = 0x20
MS_MANDLOCK = 0x40
MS_DIRSYNC = 0x80
MS_NOSYMFOLLOW = 0x100
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SILENT = 0x8000
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

_MNT_DETACH = 0x2
_UMOUNT_NOFOLLOW = 0x8

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 0x1
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOUNT_ATTR_RDONLY = 0x1
_RESOLVE_NO_XDEV = 0x1
_RESOLVE_NO_SYMLINKS = 0x4

# The same numbers on every architecture: they were given out after the tables were unified.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442

# mount(8)'s option words: (flag, whether the word clears it).
_FLAGS = {
    "ro": (MS_RDONLY, False), "rw": (MS_RDONLY, True),
    "nosuid": (MS_NOSUID, False), "suid": (MS_NOSUID, True),
    "nodev": (MS_NODEV, False), "dev": (MS_NODEV, True),
    "noexec": (MS_NOEXEC, False), "exec": (MS_NOEXEC, True),
    "sync": (MS_SYNCHRONOUS, False), "async": (MS_SYNCHRONOUS, True),
    "remount": (MS_REMOUNT, False),
    "mand": (MS_MANDLOCK, False), "nomand": (MS_MANDLOCK, True),
    "dirsync": (MS_DIRSYNC, False),
    "nosymfollow": (MS_NOSYMFOLLOW, False), "symfollow": (MS_NOSYMFOLLOW, True),
    "noatime": (MS_NOATIME, False), "atime": (MS_NOATIME, True),
    "nodiratime": (MS_NODIRATIME, False), "diratime": (MS_NODIRATIME, True),
    "bind": (MS_BIND, False), "rbind": (MS_BIND | MS_REC, False),
    "silent": (MS_SILENT, False), "loud": (MS_SILENT, True),
    "relatime": (MS_RELATIME, False), "norelatime": (MS_RELATIME, True),
    "strictatime": (MS_STRICTATIME, False), "nostrictatime": (MS_STRICTATIME, True),
    "lazytime": (MS_LAZYTIME, False), "nolazytime": (MS_LAZYTIME, True),
    "defaults": (0, False),
}
_PROPAGATION = {
    "private": MS_PRIVATE, "rprivate": MS_PRIVATE | MS_REC,
    "slave": MS_SLAVE, "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED, "rshared": MS_SHARED | MS_REC,
    "unbindable": MS_UNBINDABLE, "runbindable": MS_UNBINDABLE | MS_REC,
}

_PAGE_BYTES = 4096          # the kernel copies one page of option text, its last byte a NUL
_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


class _OpenHow(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


# -- options --------------------------------------------------------------------------------------
class Options(NamedTuple):
    """What mount(2) wants to know: ``MS_*`` flags, propagation flags (0: leave), and the rest as text."""

    flags: int
    propagation: int
    data: str


def parse_options(words):
    """Take mount(8)'s option words apart; a later word wins. Words that begin with ``X-`` or ``x-`` are
    remarks to other programs (mount(8)) and are passed over."""
    flags, propagation, data = 0, 0, []
    for word in words:
        if word in _FLAGS:
            flag, clears = _FLAGS[word]
            flags = flags & ~flag if clears else flags | flag
        elif word in _PROPAGATION:
            propagation = _PROPAGATION[word]
        elif word and not word.startswith(("X-", "x-")):
            data.append(word)
    return Options(flags, propagation, ",".join(data))


# -- mounting -------------------------------------------------------------------------------------
def mount(source, target, fstype="", options=()):
    """Mount a filesystem, as mount(8) with these option words would.

    A ``bind`` takes its other flags in a second call, for the kernel ignores them in the first; where
    they must hold from the first moment, use :func:`bind`.

    :param source: str; what it means is the filesystem's matter.
    :param fstype: "overlay", "tmpfs", ...; not looked at for a bind.
    :param options: iterable of words such as "ro", "rbind", "lowerdir=/a:/b".
    :raises OSError: the kernel refused; says what was to be mounted where.
    :raises InvalidArgument: the options need more than the page that the kernel takes.
    """
    flags, propagation, data = parse_options(options)
    with _ShortOverlay(fstype, data) as text:
        if len(os.fsencode(text)) >= _PAGE_BYTES:
            raise InvalidArgument(
                f"the options for mounting {fstype or source} on {target} have {len(text)} bytes, the "
                f"kernel takes {_PAGE_BYTES - 1}")
        if flags & MS_BIND:
            _mount(source, target, None, flags & (MS_BIND | MS_REC), None)
            rest = flags & ~(MS_BIND | MS_REC)
            if rest:
                _mount(None, target, None, rest | MS_BIND | MS_REMOUNT, None)
        else:
            _mount(source, target, fstype, flags, text or None)
    if propagation:
        _mount(None, target, None, propagation, None)


def set_propagation(target, propagation):
    """Change how mount events spread at `target`: MS_SHARED, MS_SLAVE or MS_PRIVATE (| MS_REC)."""
    _mount(None, target, None, propagation, None)


def bind(source, target, *, readonly=False, recursive=False, slave=False):
    """Show the file or directory `source` at `target`, which exists.

    The new mount is made aside, given its attributes, and attached last: where `target` lies in a
    shared mount, every view that it spreads to (the read-only tree, the one inside virtiofsd's own
    namespace) gets it read-only from its first moment. A later remount would not spread. It never
    joins the peer group of `source`, so unmounting it cannot unmount anything of the user's.

    :param recursive: take the mounts below `source` along; they become read-only too.
    :param slave: follow what is mounted below `source` later (Kubernetes' HostToContainer).
    :raises OSError: the kernel refused. :raises Unsupported: it is older than Linux 5.12.
    """
    what = f"binding {source} to {target}"
    deep = _AT_RECURSIVE if recursive else 0
    tree = _syscall(what, _SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source),
                    _OPEN_TREE_CLONE | os.O_CLOEXEC | deep)
    change = _MountAttr(attr_set=_MOUNT_ATTR_RDONLY if readonly else 0,
                        propagation=MS_SLAVE if slave else MS_PRIVATE)
    try:
        _syscall(what, _SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH | deep, ctypes.byref(change),
                 ctypes.sizeof(change))
        _syscall(what, _SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


class _ShortOverlay:
    """Overlay options that fit into the kernel's page: many layers are named by /proc/self/fd/N.

    An image of sixty layers has more path text than a page. The fds are needed during the mount only.
    """

    def __init__(self, fstype, data):
        self._text = data
        self._shorten = fstype == "overlay" and len(os.fsencode(data)) >= _PAGE_BYTES
        self._fds = []

    def __enter__(self):
        if not self._shorten:
            return self._text
        try:
            return ",".join(map(self._shorter, self._text.split(",")))
        except OSError:
            self.__exit__()
            raise

    def _shorter(self, word):
        key, _, value = word.partition("=")
        if key != "lowerdir":
            return word
        return "lowerdir=" + ":".join(map(self._name, re.split(r"(?<!\\):", value)))

    def _name(self, directory):
        path = directory.replace("\\:", ":")
        self._fds.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return f"/proc/self/fd/{self._fds[-1]}"

    def __exit__(self, *error):
        for fd in self._fds:
            os.close(fd)
        return False


# -- the table ------------------------------------------------------------------------------------
class Mount(NamedTuple):
    """One line of mountinfo."""

    id: int
    parent: int
    device: str                 # "254:0"
    root: str                   # what of the filesystem is shown
    target: str                 # the mount point
    options: tuple              # of this mount: "ro", "nosuid", ...
    tags: tuple                 # "shared:21", "master:3", ...
    fstype: str
    source: str
    super_options: tuple        # of the filesystem


def parse_table(text):
    """The text of a mountinfo file as a list of :class:`Mount`.

    :raises KatashimError: a line is not what proc(5) says.
    """
    return [_parse_line(line) for line in text.splitlines() if line]


def _parse_line(line):
    fields = line.split(" ")
    try:
        end = fields.index("-", 6)
        fstype, source, super_options = fields[end + 1:end + 4]
        return Mount(int(fields[0]), int(fields[1]), fields[2], _unescape(fields[3]),
                     _unescape(fields[4]), tuple(fields[5].split(",")), tuple(fields[6:end]),
                     _unescape(fstype), _unescape(source), tuple(super_options.split(",")))
    except ValueError as exc:
        raise KatashimError(f"not a line of mountinfo: {line!r}") from exc


def _unescape(field):
    """Undo the kernel's ``\\040`` for blank, tab, newline, backslash and hash."""
    if "\\" not in field:
        return field
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def table(pid="self"):
    """The mounts that process `pid` sees, as a list of :class:`Mount`."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as mountinfo:
        return parse_table(mountinfo.read())


def at_or_below(path, mounts=None):
    """The mounts at `path` and below it, in an order in which they can be unmounted: the ones that stand
    on others first."""
    mounts = table() if mounts is None else mounts
    parents = {entry.id: entry.parent for entry in mounts}
    base = os.path.normpath(path)
    below = base.rstrip("/") + "/"
    found = [entry for entry in mounts if entry.target == base or entry.target.startswith(below)]
    return sorted(found, key=lambda entry: _depth(entry.id, parents), reverse=True)


def _depth(number, parents):
    depth, seen = 0, set()
    while number in parents and number not in seen:
        seen.add(number)
        number = parents[number]
        depth += 1
    return depth


def is_mount_point(path):
    """Whether something is mounted at `path` (a symbolic link there is not followed)."""
    directory, name = os.path.split(os.path.normpath(path))
    try:
        parent = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        os.close(_open_inside(parent, name, os.O_PATH))
    except FileNotFoundError:
        return False
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        return True
    finally:
        os.close(parent)
    return False


# -- unmounting -----------------------------------------------------------------------------------
def unmount(target):
    """Unmount what is mounted last at `target`; no error when nothing is.

    A mount in use is detached instead: it leaves the tree now, and its filesystem when the last user
    (virtiofsd keeps files open) lets go.

    :returns: True when there was something. :raises OSError: the kernel refused.
    """
    try:
        return _umount(target, 0)
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise
    return _umount(target, _MNT_DETACH)


def unmount_below(path):
    """Unmount everything at `path` and below, stacked mounts and hidden ones included.

    :raises FailedPrecondition: something cannot be unmounted; names it.
    """
    standing = at_or_below(path)
    while standing:
        problems = []
        for entry in standing:
            try:
                unmount(entry.target)
            except OSError as exc:
                problems.append(exc)
        # A mount under another one comes within reach when that one is gone, hence the second look.
        left = at_or_below(path)
        if len(left) >= len(standing):
            raise FailedPrecondition(f"{left[0].target} stays mounted: {problems[0] if problems else 'hidden'}")
        standing = left


# -- deleting -------------------------------------------------------------------------------------
def remove_tree(path):
    """Unmount everything below `path`, then delete it, never crossing a mount or following a link.

    No error when it is gone already.

    :raises FailedPrecondition: a mount stands in the way; nothing behind it was touched.
    :raises InvalidArgument: `path` is not absolute, less than two names deep, or has ``..`` in it.
    """
    _check_deletable(path)
    unmount_below(path)
    delete_tree(path)


def delete_tree(path):
    """Delete `path` and what is below; refuses at the first mount point (same errors as `remove_tree`).

    It is the kernel that refuses: each directory is opened with openat2(RESOLVE_NO_XDEV), which sees
    bind mounts within one filesystem too and cannot be raced.
    """
    _check_deletable(path)
    directory, name = os.path.split(os.path.normpath(path))
    try:
        parent = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _delete(parent, name, path)
    finally:
        os.close(parent)


def _check_deletable(path):
    names = [name for name in path.split("/") if name not in ("", ".")]
    if not path.startswith("/") or len(names) < 2 or ".." in names:
        raise InvalidArgument(f"refusing to delete {path!r}: not a path that katashim makes")


def _delete(parent, name, path):
    try:
        if not _is_directory(parent, name):
            os.unlink(name, dir_fd=parent)
            return
        fd = _open_inside(parent, name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(fd) as entries:
                names = [entry.name for entry in entries]
            for inner in names:
                _delete(fd, inner, f"{path}/{inner}")
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except OSError as exc:
        if exc.errno not in (errno.EXDEV, errno.EBUSY):
            raise
        raise FailedPrecondition(f"refusing to delete {path}: something is mounted there") from exc


def _is_directory(parent, name):
    mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    return mode & 0o170000 == 0o040000


def _open_inside(parent, name, flags):
    """Open `name` in the directory `parent`; EXDEV when it is a mount point."""
    how = _OpenHow(flags=flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode=0,
                   resolve=_RESOLVE_NO_XDEV | (0 if flags & os.O_PATH else _RESOLVE_NO_SYMLINKS))
    return _syscall(f"opening {name}", _SYS_OPENAT2, parent, os.fsencode(name), ctypes.byref(how),
                    ctypes.sizeof(how))


# -- system calls ---------------------------------------------------------------------------------
def _mount(source, target, fstype, flags, data):
    result = _libc.mount(*(None if text is None else os.fsencode(text) for text in (source, target, fstype)),
                         ctypes.c_ulong(flags), None if data is None else os.fsencode(data))
    if result != 0:
        _fail(f"mounting {fstype or source or 'new flags'} on {target}")


def _umount(target, flags):
    if _libc.umount2(os.fsencode(target), flags | _UMOUNT_NOFOLLOW) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOENT):
        return False            # not a mount point, or not there at all
    return _fail(f"unmounting {target}")


def _syscall(what, number, *args):
    result = _libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        if ctypes.get_errno() == errno.ENOSYS:
            raise Unsupported(f"{what}: this kernel is too old, katashim needs Linux 5.12 or newer")
        _fail(what)
    return result


def _fail(what):
    code = ctypes.get_errno()
    raise OSError(code, f"{what}: {os.strerror(code)}")
