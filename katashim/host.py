"""What this machine can do, found out by trying it, each answer with its reason.

Plain (works with and without gevent's patching). Asked by the drivers when they plan a VM, and by
``katashim-ctl check``, which prints the reasons. Answers that take milliseconds to find are kept in
/run/katashim until the next boot.
"""

import json
import os
import select
import sys
import time
from typing import NamedTuple

from katashim.errors import Unsupported

CACHE_DIR = "/run/katashim"

# Loops per second of kernel-mode code under KVM. Real hardware does 10^9, a nested hypervisor that is
# itself emulated 10^8, an emulated kernel mode 10^6: there Linux needs minutes to boot, or crashes.
_NATIVE_LOOPS_PER_S = 20_000_000
_PROBE_DEADLINE_S = 5
_KVM_MODULES = ("kvm_intel", "kvm_amd", "kvm_pvm")


class Verdict(NamedTuple):
    """Whether something works here, and why or why not, as one sentence."""

    usable: bool
    why: str


# -- KVM ------------------------------------------------------------------------------------------
def kvm_usable():
    """Whether KVM can run a Linux guest: the device opens, and kernel-mode code runs natively.

    The speed is measured once per boot (katashim/kvm_probe.py, some 30 ms); later calls read the cache.
    """
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Verdict(False, f"there is no /dev/kvm ({_loaded_kvm_modules()})")
    except OSError as exc:
        return Verdict(False, f"/dev/kvm cannot be opened: {exc.strerror}")
    modules = _loaded_kvm_modules()
    speed = _cached("kvm", [_boot_id(), modules, os.stat("/dev/kvm").st_ctime_ns], _measure_kvm)
    if "error" in speed:
        return Verdict(False, f"KVM does not work: {speed['error']} ({modules})")
    loops = speed["loops_per_s"]
    pace = f"{loops / 1e6:,.1f} million loops a second in kernel mode ({modules})"
    if loops < _NATIVE_LOOPS_PER_S:
        return Verdict(False, f"KVM only emulates a guest's kernel, too slowly for Linux: {pace}")
    return Verdict(True, f"KVM runs a guest's kernel natively: {pace}")


def _loaded_kvm_modules():
    loaded = [name for name in _KVM_MODULES if os.path.isdir(f"/sys/module/{name}")]
    return f"module {', '.join(loaded)}" if loaded else f"no module of {', '.join(_KVM_MODULES)} is loaded"


def _measure_kvm():
    """Run the probe in a process of its own; its answer, or an error in its place."""
    import subprocess
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kvm_probe.py")
    probe = subprocess.Popen([sys.executable, "-IS", program], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        text = _read_all(probe.stdout.fileno(), _PROBE_DEADLINE_S)
    finally:
        probe.kill()
        probe.wait()
        probe.stdout.close()
    if text is None:
        return {"error": f"the probe did not end in {_PROBE_DEADLINE_S} s"}
    try:
        return json.loads(text)
    except ValueError:
        return {"error": "the probe died"}


def _read_all(fd, timeout_s):
    """All bytes of a pipe until its end, or None when time runs out."""
    end, text = time.monotonic() + timeout_s, b""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while True:
        if not poller.poll(max(0, end - time.monotonic()) * 1000):
            return None
        piece = os.read(fd, 65536)
        if not piece:
            return text
        text += piece


# -- devices of the kernel ------------------------------------------------------------------------
def vhost_vsock_available():
    """Whether the kernel itself can carry vsock connections of guests."""
    return _device("/dev/vhost-vsock", "module vhost_vsock")


def vhost_net_available():
    """Whether the kernel can move a guest's packets (vhost-net)."""
    return _device("/dev/vhost-net", "module vhost_net")


def tun_available():
    """Whether taps can be made."""
    return _device("/dev/net/tun", "module tun")


def _device(path, needs):
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Verdict(False, f"there is no {path} ({needs} is not loaded)")
    except OSError as exc:
        return Verdict(False, f"{path} cannot be opened: {exc.strerror}")
    return Verdict(True, f"{path} opens")


def io_uring_available():
    """Whether io_uring may be used; containers and hardened kernels often forbid it."""
    import ctypes
    sys_io_uring_setup, parameters = 425, ctypes.create_string_buffer(120)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(sys_io_uring_setup, 1, parameters)
    if fd < 0:
        return Verdict(False, f"io_uring_setup fails: {os.strerror(ctypes.get_errno())}")
    os.close(fd)
    return Verdict(True, "io_uring_setup works")


def hugepages_free_mb():
    """MiB of free huge pages of the default size."""
    return _meminfo("HugePages_Free") * _meminfo("Hugepagesize") // 1024


# -- size and clock -------------------------------------------------------------------------------
def online_cpus():
    """Number of CPUs that are online."""
    return os.sysconf("SC_NPROCESSORS_ONLN")


def memory_mb():
    """Memory of this machine in MiB."""
    return _meminfo("MemTotal") // 1024


def _meminfo(name):
    with open("/proc/meminfo", "rb") as lines:
        for line in lines:
            key, _, value = line.partition(b":")
            if key == name.encode():
                return int(value.split()[0])
    return 0


def cgroup_mode(mountinfo="/proc/self/mountinfo"):
    """``"v2"``, ``"v1"``, or ``"hybrid"``: v1 hierarchies with a v2 tree beside them."""
    kinds = {}                  # of mounts over each other the last counts
    with open(mountinfo, "rb") as lines:
        for line in lines:
            place, _, filesystem = line.partition(b" - ")
            kinds[place.split()[4]] = filesystem.split()[0]
    if kinds.get(b"/sys/fs/cgroup") == b"cgroup2":
        return "v2"
    return "hybrid" if kinds.get(b"/sys/fs/cgroup/unified") == b"cgroup2" else "v1"


def tsc_khz():
    """Frequency of the CPU's time stamp counter in kHz, measured against the monotonic clock.

    A guest under TCG sees the host's counter. Given the frequency (``tsc_early_khz=``), its kernel
    need not calibrate, which on QEMU's microvm hangs in one boot of seven.

    :raises Unsupported: this is not an x86 CPU, or executable memory is forbidden here.
    """
    if os.uname().machine != "x86_64":
        raise Unsupported(f"there is no time stamp counter on {os.uname().machine}")
    return _cached("tsc", [_boot_id()], _measure_tsc)["khz"]


def _measure_tsc(interval_s=0.01):
    import ctypes
    import mmap
    rdtsc = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"     # rdtsc; shl rdx,32; or rax,rdx; ret
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except PermissionError as exc:
        raise Unsupported("executable memory is forbidden, so the time stamp counter cannot be read") from exc
    code.write(rdtsc)
    handle = ctypes.c_char.from_buffer(code)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(handle))
    clock_a, ticks_a = _tick_at(read)
    time.sleep(interval_s)
    clock_b, ticks_b = _tick_at(read)
    return {"khz": round((ticks_b - ticks_a) * 1e6 / (clock_b - clock_a))}


def _tick_at(read):
    """(ns, ticks) read at one moment: of some tries, the one that was interrupted least."""
    tries = []
    for _ in range(5):
        before = time.monotonic_ns()
        ticks = read()
        after = time.monotonic_ns()
        tries.append((after - before, (before + after) / 2, ticks))
    return min(tries)[1:]


def checks():
    """``[(what, Verdict)]`` for ``katashim-ctl check``."""
    return [("KVM", kvm_usable()), ("vhost-vsock", vhost_vsock_available()),
            ("vhost-net", vhost_net_available()), ("tun/tap", tun_available()),
            ("io_uring", io_uring_available())]


# -- answers kept until the next boot -------------------------------------------------------------
def _boot_id():
    with open("/proc/sys/kernel/random/boot_id") as line:
        return line.read().strip()


def _cached(name, key, measure):
    """The answer (a dict) kept under `name`, or a fresh one when none is kept or `key` has changed.

    Where the cache cannot be written (another user, a full /run), the answer is simply not kept.
    """
    path = f"{CACHE_DIR}/{name}.json"
    try:
        with open(path) as kept:
            entry = json.load(kept)
        if entry["key"] == key:
            return entry["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        pass                                    # none, or cut off, or of another version: measure
    answer = measure()
    if "error" not in answer:                   # which may be over the next time
        _keep(path, {"key": key, "answer": answer})
    return answer


def _keep(path, entry):
    fresh = f"{path}.{os.getpid()}"
    try:
        os.makedirs(CACHE_DIR, 0o755, exist_ok=True)
        with open(fresh, "w") as file:
            json.dump(entry, file)
        os.replace(fresh, path)
    except OSError:
        if os.path.exists(fresh):
            os.unlink(fresh)
