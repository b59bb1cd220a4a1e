"""What the agent does as PID 1, before it can serve: mounts, modules, terminal, host name, loopback.

Follows what upstream's agent mounts in its init mode. The root is a read-only image, so /tmp and /var become
tmpfs. Called by main.py.
"""

import fcntl
import os
import struct
from _socket import AF_INET, SOCK_DGRAM, sethostname, socket

from katashim.guest.agent import linux, log, modules

_FS = linux.MS_NOSUID | linux.MS_NODEV
_MOUNTS = (
    # source, target, type, flags, data
    ("proc", "/proc", "proc", _FS | linux.MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", _FS | linux.MS_NOEXEC, ""),
    ("dev", "/dev", "devtmpfs", linux.MS_NOSUID, ""),
    ("tmpfs", "/dev/shm", "tmpfs", _FS, ""),
    ("devpts", "/dev/pts", "devpts", linux.MS_NOSUID | linux.MS_NOEXEC, "ptmxmode=0666,mode=0620,gid=5"),
    ("tmpfs", "/run", "tmpfs", _FS, "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", _FS, "mode=1777"),
    ("tmpfs", "/var", "tmpfs", _FS, "mode=0755"),
)
_VAR = ("cache", "lib", "log", "tmp")
_CGROUP_ROOT = "/sys/fs/cgroup"
_FILES = 65536
_READ_AHEAD = "/usr/lib/katashim/read-ahead"     # written by the image builder
PATH = "/bin:/sbin:/usr/bin:/usr/sbin"

_TIOCSCTTY, _SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x540E, 0x8913, 0x8914, 1


def mount_all():
    """Mount the kernel's filesystems and the writable places. What is mounted already is left alone."""
    for source, target, fstype, flags, data in _MOUNTS:
        os.makedirs(target, exist_ok=True)
        try:
            linux.mount(source, target, fstype, flags, data)
        except OSError as exc:
            if fstype != "devtmpfs":    # the kernel or the initrd may have mounted that one
                raise
            log.debug("boot", f"/dev: {exc}")
    for name in _VAR:
        os.makedirs(f"/var/{name}", exist_ok=True)
    os.chmod("/var/tmp", 0o1777)
    os.symlink("/run", "/var/run")
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(target, f"/dev/{name}")
    if os.path.lexists("/dev/ptmx"):
        os.unlink("/dev/ptmx")
    os.symlink("/dev/pts/ptmx", "/dev/ptmx")


def mount_cgroups(unified):
    """Mount cgroup2, or every controller of version 1 that the kernel has (none if it lacks `devices`)."""
    flags = _FS | linux.MS_NOEXEC | linux.MS_RELATIME
    if unified:
        try:
            # Without favordynmods (Linux 6.0), putting a process into a cgroup waits for an RCU grace period.
            linux.mount("cgroup2", _CGROUP_ROOT, "cgroup2", flags, "nsdelegate,favordynmods")
        except OSError:
            linux.mount("cgroup2", _CGROUP_ROOT, "cgroup2", flags, "nsdelegate")
        return
    with open("/proc/cgroups") as file:
        rows = [line.split() for line in file if not line.startswith("#")]
    controllers = [row[0] for row in rows if row[3] == "1"]
    if "devices" not in controllers:
        log.warning("boot", "the kernel has no devices controller: containers run without cgroups")
        return
    linux.mount("tmpfs", _CGROUP_ROOT, "tmpfs", flags, "mode=0755")
    for name in controllers:
        os.mkdir(f"{_CGROUP_ROOT}/{name}")
        linux.mount("cgroup", f"{_CGROUP_ROOT}/{name}", "cgroup", flags, name)
    os.mkdir(f"{_CGROUP_ROOT}/systemd")
    linux.mount("cgroup", f"{_CGROUP_ROOT}/systemd", "cgroup", flags, "none,name=systemd")
    linux.mount("tmpfs", _CGROUP_ROOT, "tmpfs", flags | linux.MS_REMOUNT | linux.MS_RDONLY, "mode=0755")
    if "memory" in controllers:
        _write(f"{_CGROUP_ROOT}/memory/memory.use_hierarchy", "1")


def hurry_rcu():
    """Have the kernel not wait for the next tick in the many places where containers make it wait (mounts,
    namespaces, cgroups): 10 ms each on a guest with few CPUs, which pays nothing for it."""
    _write("/sys/kernel/rcu_expedited", "1")


def allow_many_files():
    """Let the agent have more than 1024 files open: each process of each container takes up to four."""
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))


def read_ahead():
    """Have the kernel read crun and its libraries now, before the first container needs them."""
    try:
        with open(_READ_AHEAD) as file:
            paths = file.read().split()
    except FileNotFoundError:
        return      # not our image
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        os.close(fd)


def take_terminal():
    """Become a session leader with the console as its terminal, so that a shell on it has job control."""
    try:
        os.setsid()
        fcntl.ioctl(0, _TIOCSCTTY, 1)
    except OSError as exc:
        log.debug("boot", f"no controlling terminal: {exc}")


def set_host_name():
    """What /etc/hostname says, else ``localhost``."""
    try:
        with open("/etc/hostname") as file:
            name = file.read().strip()
    except FileNotFoundError:
        name = ""
    sethostname(name or "localhost")


def loopback_up():
    """Set the interface lo up."""
    probe = socket(AF_INET, SOCK_DGRAM)
    try:
        name = b"lo".ljust(16, b"\0")
        flags, = struct.unpack_from("<H", fcntl.ioctl(probe.fileno(), _SIOCGIFFLAGS, name + bytes(24)), 16)
        fcntl.ioctl(probe.fileno(), _SIOCSIFFLAGS, name + struct.pack("<H22x", flags | _IFF_UP))
    finally:
        probe.close()


def load_modules(console):
    """The modules that the agent must have before it listens: the socket family, and a virtio console
    when the kernel was told to print there."""
    if console.startswith("hvc"):
        modules.load_virtio(modules.VIRTIO_CONSOLE)
    modules.load_virtio(modules.VIRTIO_VSOCK)


def _write(path, text):
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as exc:
        log.debug("boot", f"{path}: {exc}")
