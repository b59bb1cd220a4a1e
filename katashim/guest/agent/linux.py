"""System calls that Python's standard library lacks, by ctypes; each raises OSError with its object's name.

The constants are those of linux/mount.h, linux/sched.h, linux/prctl.h, linux/capability.h and
linux/reboot.h. Called by the whole agent.
"""

import ctypes
import os

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_SYNCHRONOUS, MS_REMOUNT, MS_MANDLOCK, MS_DIRSYNC = 16, 32, 64, 128
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_MOVE, MS_REC, MS_SILENT = 1024, 2048, 4096, 8192, 16384, 32768
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MS_RELATIME, MS_I_VERSION, MS_STRICTATIME, MS_LAZYTIME = 1 << 21, 1 << 23, 1 << 24, 1 << 25
MNT_DETACH = 2

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000

PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 4, 24, 38, 36
PR_SET_KEEPCAPS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 8, 47, 2, 4

RB_AUTOBOOT, RB_POWER_OFF = 0x01234567, 0x4321FEDC

_SYS_FINIT_MODULE, _SYS_OPENAT2, _SYS_CAPSET = 313, 437, 126        # x86-64
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.syscall.argtypes = None
_libc.syscall.restype = ctypes.c_long


def _check(result, *what):
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), *what)
    return result


def mount(source, target, fstype="", flags=0, data=""):
    """mount(2). :param data: the filesystem's own options, separated by commas."""
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode() or None, flags,
                       data.encode() or None), source, None, target)


def bind(source, target, recursive=False):
    """Bind `source` onto `target`."""
    mount(source, target, flags=MS_BIND | (MS_REC if recursive else 0))


def umount(target, flags=0):
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def setns(fd, kinds):
    """Enter namespaces: those of a namespace file, or several `kinds` of the process behind a pidfd."""
    _check(_libc.setns(fd, kinds))


def unshare(kinds):
    """unshare(2), for the calling thread."""
    _check(_libc.unshare(kinds))


def prctl(option, *arguments):
    """prctl(2); returns its result."""
    arguments += (0,) * (4 - len(arguments))
    return _check(_libc.prctl(option, *arguments))


def reboot(how):
    """reboot(2) with one of RB_*."""
    _check(_libc.reboot(ctypes.c_int(how)))


def swapon(path):
    """swapon(2)."""
    _check(_libc.swapon(os.fsencode(path), 0), path)


def load_module(path, parameters=""):
    """Insert the kernel module file `path`. One that is loaded already is no error."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.syscall(_SYS_FINIT_MODULE, fd, parameters.encode(), 0), path)
    except FileExistsError:
        pass
    finally:
        os.close(fd)


def open_in_root(root_fd, path, flags, mode=0):
    """Open `path` as if the directory `root_fd` were the root: neither a link nor ``..`` leads out.

    openat2(2) with RESOLVE_IN_ROOT.
    """
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    return _check(_libc.syscall(_SYS_OPENAT2, root_fd, os.fsencode(path), ctypes.byref(how),
                                ctypes.c_size_t(ctypes.sizeof(how))), path)


def set_capabilities(effective, permitted, inheritable):
    """capset(2) for the calling thread. :param effective: and the others: bit masks of 64 bits."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (effective, permitted, inheritable)
    data = (ctypes.c_uint32 * 6)(*(mask & 0xFFFFFFFF for mask in sets), *(mask >> 32 for mask in sets))
    _check(_libc.syscall(_SYS_CAPSET, ctypes.byref(header), ctypes.byref(data)))
