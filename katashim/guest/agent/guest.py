"""The guest as a machine: CPUs and memory, clock, random numbers, swap, firewall. Called by pod_rpcs.py."""

import fcntl
import os
import struct
import time

from katashim.guest.agent import devices, linux, uevents
from katashim.guest.agent.rpcerror import INTERNAL, RpcError

_CPU_DIR, _MEMORY_DIR = "/sys/devices/system/cpu", "/sys/devices/system/memory"
_CPU_TRIES, _CPU_PAUSE_S = 100, 0.05
_RNDADDTOENTCNT, _RNDRESEEDCRNG = 0x40045201, 0x5207


def memory_block_bytes():
    """How much memory is brought online at a time, 0 where the kernel cannot do that."""
    try:
        with open(f"{_MEMORY_DIR}/block_size_bytes") as file:
            return int(file.read(), 16)
    except FileNotFoundError:
        return 0


def has_memory_probe():
    """Whether new memory must be announced to the kernel by hand."""
    return os.path.exists(f"{_MEMORY_DIR}/probe")


def probe_memory(addresses):
    """Announce memory at physical `addresses`."""
    for address in addresses:
        with open(f"{_MEMORY_DIR}/probe", "w") as file:
            file.write(f"{address:#X}")


def has_seccomp():
    """Whether the kernel has seccomp filters."""
    with open("/proc/self/status") as file:
        return any(line.startswith("Seccomp:") for line in file)


def online(cpus, cpu_only):
    """Bring CPUs online until `cpus` are, and all memory unless `cpu_only`.

    :raises RpcError: fewer CPUs came.
    """
    for _ in range(_CPU_TRIES if cpus else 0):
        if _online_cpus(cpus) >= cpus:
            break
        time.sleep(_CPU_PAUSE_S)
    else:
        if cpus:
            raise RpcError(INTERNAL, f"failed to online {cpus} CPUs: {_online_cpus(cpus)} are")
    if not cpu_only and os.path.isdir(_MEMORY_DIR):
        for name in os.listdir(_MEMORY_DIR):
            if name.startswith("memory"):
                uevents.online_memory(f"{_MEMORY_DIR}/{name}")


def online_cpu_list():
    """The kernel's list of CPUs that are online, such as ``0-3``."""
    with open(f"{_CPU_DIR}/online") as file:
        return file.read().strip()


def set_clock(seconds, microseconds):
    """Set the time of day."""
    time.clock_settime(time.CLOCK_REALTIME, seconds + microseconds / 1e6)


def reseed(data):
    """Mix `data` into the kernel's random numbers."""
    fd = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
        fcntl.ioctl(fd, _RNDADDTOENTCNT, struct.pack("i", len(data) * 8))
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def add_swap(slots, timeout_s):
    """Swap on the disk at a PCI path of slot numbers."""
    path = "/".join(f"{slot:02x}" for slot in slots)
    linux.swapon(devices.block_by_pci(path, timeout_s))


def volume_fill(path):
    """``(total bytes, available, used, total inodes, available, used)`` of the filesystem at `path`."""
    facts = os.statvfs(path)
    block = facts.f_frsize
    return (facts.f_blocks * block, facts.f_bavail * block, (facts.f_blocks - facts.f_bfree) * block,
            facts.f_files, facts.f_ffree, facts.f_files - facts.f_ffree)


def iptables_save(ipv6):
    """The firewall's rules, as bytes."""
    return _firewall("ip6tables-save" if ipv6 else "iptables-save", [])


def iptables_restore(ipv6, rules):
    """Replace the firewall's rules; returns what the program said."""
    return _firewall("ip6tables-restore" if ipv6 else "iptables-restore", ["--wait", "5"], rules)


def _firewall(program, arguments, stdin=b""):
    from katashim.guest.agent import programs
    path = next((path for path in (f"/usr/sbin/{program}", f"/sbin/{program}") if os.path.exists(path)), None)
    if path is None:
        raise RpcError(INTERNAL, f"there is no {program} in this guest")
    done = programs.run([path, *arguments], timeout_s=30, stdin=stdin)
    if done.status != 0:
        raise RpcError(INTERNAL, f"{program} ended with {done.status}: {done.text()}")
    return done.output


def _online_cpus(wanted):
    """Bring up to `wanted` CPUs online; returns how many are."""
    count = 0
    for name in sorted(os.listdir(_CPU_DIR)):
        if not name.startswith("cpu") or not name[3:].isdigit():
            continue
        path = f"{_CPU_DIR}/{name}/online"
        try:
            with open(path, "r+") as file:      # the boot CPU has no such file
                state = file.read().strip()
                if state == "0" and count < wanted:
                    file.seek(0)
                    file.write("1")
                    state = "1"
                count += state == "1"
        except FileNotFoundError:
            count += 1
        except OSError:
            continue        # being plugged just now: another try comes
    return count
