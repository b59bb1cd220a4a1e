"""Mounting as the host asks for it: options in words, mount points made, what is mounted already left alone.

Called by storage.py, container.py, rpcs of sandbox.py. The option words are those of mount(8).
"""

import os

from katashim.guest.agent import linux
from katashim.guest.agent.rpcerror import INVALID_ARGUMENT, RpcError

# word: (flag, whether the word clears it)
_FLAGS = {
    "ro": (linux.MS_RDONLY, False), "rw": (linux.MS_RDONLY, True),
    "nosuid": (linux.MS_NOSUID, False), "suid": (linux.MS_NOSUID, True),
    "nodev": (linux.MS_NODEV, False), "dev": (linux.MS_NODEV, True),
    "noexec": (linux.MS_NOEXEC, False), "exec": (linux.MS_NOEXEC, True),
    "sync": (linux.MS_SYNCHRONOUS, False), "async": (linux.MS_SYNCHRONOUS, True),
    "dirsync": (linux.MS_DIRSYNC, False), "remount": (linux.MS_REMOUNT, False),
    "mand": (linux.MS_MANDLOCK, False), "nomand": (linux.MS_MANDLOCK, True),
    "noatime": (linux.MS_NOATIME, False), "atime": (linux.MS_NOATIME, True),
    "nodiratime": (linux.MS_NODIRATIME, False), "diratime": (linux.MS_NODIRATIME, True),
    "relatime": (linux.MS_RELATIME, False), "norelatime": (linux.MS_RELATIME, True),
    "strictatime": (linux.MS_STRICTATIME, False), "nostrictatime": (linux.MS_STRICTATIME, True),
    "lazytime": (linux.MS_LAZYTIME, False), "nolazytime": (linux.MS_LAZYTIME, True),
    "iversion": (linux.MS_I_VERSION, False), "noiversion": (linux.MS_I_VERSION, True),
    "bind": (linux.MS_BIND, False), "rbind": (linux.MS_BIND | linux.MS_REC, False),
    "silent": (linux.MS_SILENT, False), "loud": (linux.MS_SILENT, True), "defaults": (0, False),
}
_PROPAGATION = {
    "unbindable": linux.MS_UNBINDABLE, "runbindable": linux.MS_UNBINDABLE | linux.MS_REC,
    "private": linux.MS_PRIVATE, "rprivate": linux.MS_PRIVATE | linux.MS_REC,
    "shared": linux.MS_SHARED, "rshared": linux.MS_SHARED | linux.MS_REC,
    "slave": linux.MS_SLAVE, "rslave": linux.MS_SLAVE | linux.MS_REC,
}
_PAGE = 4096


class Options:
    """Mount options by meaning. :ivar flags: MS_*. :ivar data: the filesystem's own words.
    :ivar propagation: MS_* to be set afterwards, each by a call of its own."""

    def __init__(self, words):
        self.flags, self.propagation, data = 0, [], []
        for word in words:
            if word in _FLAGS:
                flag, clear = _FLAGS[word]
                self.flags = self.flags & ~flag if clear else self.flags | flag
            elif word in _PROPAGATION:
                self.propagation.append(_PROPAGATION[word])
            elif word == "loop":
                raise RpcError(INVALID_ARGUMENT, "loop mounts are not supported")
            elif word:
                data.append(word)
        self.data = ",".join(data)
        if len(self.data) >= _PAGE:
            raise RpcError(INVALID_ARGUMENT,
                           f"mount options of {len(self.data)} bytes, {_PAGE - 1} at most are possible")


def mount(source, target, fstype, words):
    """Mount `source` on `target`, which is made, unless the same filesystem is mounted there already.

    A bind mount that is to have other flags than its source gets them by a second call, as mount(8) does it.

    :param words: mount options. :raises RpcError: something is missing. :raises OSError: the kernel refuses.
    """
    if not source or not target or not fstype:
        raise RpcError(INVALID_ARGUMENT,
                       f"a mount lacks source ({source!r}), target ({target!r}) or type ({fstype!r})")
    options = Options(words)
    binding = fstype == "bind" or options.flags & linux.MS_BIND
    make_target(source if binding else "", target)
    if not binding and type_at(target) == fstype:
        return
    if binding:
        linux.mount(source, target, flags=linux.MS_BIND | options.flags & linux.MS_REC)
        rest = options.flags & ~linux.MS_REC & ~linux.MS_BIND
        if rest:
            linux.mount("", target, flags=linux.MS_BIND | linux.MS_REMOUNT | rest)
    else:
        linux.mount(source, target, fstype, options.flags, options.data)
    for flag in options.propagation:
        linux.mount("", target, flags=flag)


def make_target(source, target):
    """Make a mount point: a file for a `source` that is there and no directory, else a directory."""
    if source and os.path.exists(source) and not os.path.isdir(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if not os.path.exists(target):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    else:
        os.makedirs(target, exist_ok=True)


def table():
    """All mounts as ``(mount point, type)``, in the order they were made."""
    rows = []
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            rows.append((_unescape(before.split()[4]), after.split()[0]))
    return rows


def type_at(path):
    """The type of the filesystem that is mounted at `path` exactly, "" when nothing is."""
    path = os.path.realpath(path)
    found = ""
    for mount_point, fstype in table():
        if mount_point == path:
            found = fstype
    return found


def unmount(path):
    """Unmount what is mounted at `path`; nothing there is no error."""
    if type_at(path):
        linux.umount(path, linux.MNT_DETACH)


def unmount_below(path):
    """Unmount everything at and below the directory `path`, the last mount first."""
    path = os.path.realpath(path)
    for mount_point, _ in reversed(table()):
        if mount_point == path or mount_point.startswith(f"{path}/"):
            linux.umount(mount_point, linux.MNT_DETACH)


def remove_tree(path):
    """Delete a directory of the agent's, without following a mount into anybody's data."""
    if os.path.isdir(path):
        unmount_below(path)
        _delete(path)


def _delete(path):
    """Delete a directory with all in it. (Loading shutil, which has it, takes 45 ms of each start.)"""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _delete(entry.path)
            else:
                os.unlink(entry.path)
    os.rmdir(path)


def _unescape(text):
    """mountinfo writes space, tab, newline and backslash as ``\\040`` and so on."""
    if "\\" not in text:
        return text
    head, *rest = text.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)
