"""What the settings and this host come to for one QEMU machine: every decision made before a launch.

A :class:`Plan` is plain data; katashim.drivers.qemu_cmdline turns it into a command line and nothing
else looks at the configuration again. Settings that cannot work here are ConfigErrors that name them.
Plain (blocking file reads, a probe): katashim.drivers.qemu calls it in a native thread.
"""

import logging
import math
import mmap
import os
from typing import NamedTuple

from katashim import host
from katashim.errors import ConfigError, Unsupported

log = logging.getLogger(__name__)

MACHINES = ("q35", "microvm")
MEMORY_MIN_MB = 64
BRIDGES_MAX = 5
_HOTPLUG_SLOTS_MAX = 255                # QEMU's ACPI_MAX_RAM_SLOTS is 256


class Plan(NamedTuple):
    """A machine to be. Sizes in MiB; "" and 0 mean none."""

    program: str
    machine: str                # "q35" or "microvm"
    accel: str                  # "kvm" or "tcg"
    accel_why: str              # one sentence
    pci: bool                   # else virtio-mmio
    acpi: bool
    kernel: str
    kernel_params: str = ""     # the user's
    initrd: str = ""            # the root filesystem, or what leads to `image`
    image: str = ""
    image_device: str = ""      # the kernel's root=: "/dev/vda" or "/dev/vda1"
    rootfs_type: str = "ext4"
    vcpus: int = 1
    max_vcpus: int = 1
    memory_mb: int = 2048
    max_memory_mb: int = 2048
    memory_slots: int = 0
    shared_memory: bool = False
    hugepages: bool = False
    prealloc: bool = False
    machine_options: str = ""
    cpu_features: str = ""
    firmware: str = ""
    sandbox: str = ""           # QEMU's -sandbox
    entropy_source: str = "/dev/urandom"
    bridges: int = 0
    scsi: bool = False
    iothreads: int = 0
    free_page_reporting: bool = False
    tsc_khz: int = 0            # 0: the guest calibrates its clock itself
    disk_aio: str = "threads"
    disk_cache: dict = None
    disk_queues: int = 1
    disk_queue_size: int = 128
    sector_sizes: tuple = (0, 0)
    selinux: bool = False
    debug: bool = False

    @property
    def hotplug(self):
        """Whether disks, cards, vCPUs and memory can be plugged in while it runs."""
        return self.machine == "q35"


def make_plan(settings):
    """The Plan for a VM.

    :param settings: the hypervisor record of a katashim.config.Config.
    :raises ConfigError: a setting cannot work on this host; names it.
    """
    _check_program(settings)
    machine = _machine(settings)
    _refuse_what_is_promised_elsewhere(settings)
    accel, why = _accel(settings)
    options = settings.machine_accelerators
    pci = machine == "q35" or "pcie=on" in options.split(",")
    acpi = machine == "q35" or pci or not announces_mmio_by_cmdline(settings.kernel)
    initrd, image, image_device = _root(settings)
    vcpus, max_vcpus = _vcpus(settings, machine)
    memory_mb, max_memory_mb, slots = _memory(settings, machine)
    return Plan(
        program=settings.path, machine=machine, accel=accel, accel_why=why, pci=pci, acpi=acpi,
        kernel=_readable(settings, "kernel"), kernel_params=settings.kernel_params,
        initrd=initrd, image=image, image_device=image_device, rootfs_type=settings.rootfs_type,
        vcpus=vcpus, max_vcpus=max_vcpus,
        memory_mb=memory_mb, max_memory_mb=max_memory_mb, memory_slots=slots,
        hugepages=settings.enable_hugepages, prealloc=settings.enable_mem_prealloc,
        machine_options=options, cpu_features=settings.cpu_features, firmware=settings.firmware,
        sandbox=settings.seccomp_sandbox or "", entropy_source=settings.entropy_source,
        bridges=_bridges(settings, machine),
        scsi=_uses_scsi(settings, pci),
        iothreads=_iothreads(settings), free_page_reporting=settings.reclaim_guest_freed_memory,
        tsc_khz=_tsc_khz(machine) if accel == "tcg" else 0,
        disk_aio=_disk_aio(settings), disk_cache=_disk_cache(settings),
        disk_queues=settings.num_queues, disk_queue_size=_queue_size(settings),
        sector_sizes=(settings.block_device_logical_sector_size,
                      settings.block_device_physical_sector_size),
        selinux=not settings.disable_guest_selinux, debug=settings.enable_debug)


# -- program, machine, accelerator ----------------------------------------------------------------
def _check_program(settings):
    if not settings.path:
        raise ConfigError("path names no QEMU program")
    if not os.path.isfile(settings.path):
        raise ConfigError(f"path = {settings.path}: there is no such program; install QEMU "
                          "(Debian: qemu-system-x86) or correct the setting")
    if not os.access(settings.path, os.X_OK):
        raise ConfigError(f"path = {settings.path}: it cannot be executed")


def _machine(settings):
    machine = settings.machine_type or "q35"
    if machine not in MACHINES:
        raise ConfigError(f"machine_type = {machine}: this driver has {' and '.join(MACHINES)}")
    return machine


def _refuse_what_is_promised_elsewhere(settings):
    """Settings that promise protection must never be passed over in silence."""
    if settings.confidential_guest:
        raise Unsupported("confidential_guest: the qemu driver has no confidential guests yet")
    if settings.rootless:
        raise Unsupported("rootless: the qemu driver runs QEMU as root only")


def _accel(settings):
    """``(accelerator, why)``."""
    if settings.accel == "tcg":
        return "tcg", "the setting accel = tcg"
    verdict = host.kvm_usable()
    if verdict.usable:
        return "kvm", verdict.why
    if settings.accel == "kvm":
        raise ConfigError(f"accel = kvm: {verdict.why}; accel = auto would use QEMU's own emulator")
    return "tcg", verdict.why


def _tsc_khz(machine):
    try:
        return host.tsc_khz()
    except Unsupported as exc:
        if machine == "microvm":
            raise ConfigError(f"machine_type = microvm: without KVM its guest's clock must be told the "
                              f"frequency of the host's: {exc.message}; use machine_type = q35") from exc
        log.warning("the guest calibrates its clock itself: %s", exc.message)
        return 0


def announces_mmio_by_cmdline(kernel):
    """Whether a kernel finds virtio-mmio devices by ``virtio_mmio.device=`` on its command line.

    Then a microvm can do without ACPI, which boots faster. Only an uncompressed kernel can be looked
    into: the name of the parameter is in it when VIRTIO_MMIO and VIRTIO_MMIO_CMDLINE_DEVICES are built in.
    """
    try:
        with open(kernel, "rb") as file:
            if file.read(4) != b"\x7fELF":
                return False
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
                return text.find(b"virtio_mmio.device\0") >= 0
    except OSError:
        return False                # its absence is told when the setting is checked


# -- kernel and root filesystem -------------------------------------------------------------------
def _root(settings):
    """``(initrd, image, root device)``."""
    if settings.image and settings.initrd:
        raise ConfigError("image and initrd are both set; a guest has one root filesystem "
                          "(boot_initrd is the one that may stand beside image)")
    if settings.boot_initrd and not settings.image:
        raise ConfigError("boot_initrd is set without image; it only leads to one")
    if settings.image:
        image = _readable(settings, "image")
        initrd = _readable(settings, "boot_initrd") if settings.boot_initrd else ""
        return initrd, image, "/dev/vda1" if is_partitioned(image) else "/dev/vda"
    if settings.initrd:
        return _readable(settings, "initrd"), "", ""
    raise ConfigError("neither image nor initrd is set; a guest needs a root filesystem")


def _readable(settings, name):
    path = getattr(settings, name)
    if not path:
        raise ConfigError(f"{name} is not set")
    try:
        with open(path, "rb"):
            return path
    except OSError as exc:
        raise ConfigError(f"{name} = {path}: {exc.strerror}") from exc


def is_partitioned(image):
    """Whether a disk image begins with a partition table, MBR or GPT, and not with a filesystem.

    A boot signature alone proves nothing, for filesystems may carry one; an MBR has an entry in use.
    """
    with open(image, "rb") as file:
        head = file.read(1024)
    if head[512:520] == b"EFI PART":
        return True
    if head[510:512] != b"\x55\xaa":
        return False
    entries = [head[at:at + 16] for at in range(446, 510, 16)]
    plausible = all(entry[0] in (0x00, 0x80) for entry in entries)
    return plausible and any(entry[4] != 0 and entry[12:16] != bytes(4) for entry in entries)


# -- processors and memory ------------------------------------------------------------------------
def _vcpus(settings, machine):
    """``(at boot, at most)``."""
    online = host.online_cpus()
    wanted = settings.default_vcpus
    vcpus = online if wanted < 0 else max(1, math.ceil(wanted))
    most = settings.default_maxvcpus or online
    if vcpus > most:
        raise ConfigError(f"default_vcpus = {wanted:g} is more than default_maxvcpus = {most}")
    return vcpus, vcpus if machine == "microvm" else most


def _memory(settings, machine):
    """``(at boot, at most, slots for DIMMs)``."""
    memory = settings.default_memory
    if memory < MEMORY_MIN_MB:
        raise ConfigError(f"default_memory = {memory} MiB is less than {MEMORY_MIN_MB} MiB")
    most = settings.default_maxmemory or max(memory, host.memory_mb())
    if memory > most:
        raise ConfigError(f"default_memory = {memory} MiB is more than default_maxmemory = {most} MiB")
    if settings.enable_hugepages and (free := host.hugepages_free_mb()) < memory:
        raise ConfigError(f"enable_hugepages: the host has {free} MiB of free huge pages, the VM needs "
                          f"{memory} MiB; see vm.nr_hugepages")
    if machine == "microvm" or most == memory or not settings.memory_slots:
        return memory, memory, 0
    return memory, most, min(settings.memory_slots, _HOTPLUG_SLOTS_MAX)


# -- devices --------------------------------------------------------------------------------------
def _bridges(settings, machine):
    if settings.default_bridges > BRIDGES_MAX:
        raise ConfigError(f"default_bridges = {settings.default_bridges} is more than {BRIDGES_MAX}")
    return settings.default_bridges if machine == "q35" else 0


def _uses_scsi(settings, pci):
    if settings.block_device_driver != "virtio-scsi":
        return False
    if not pci:
        raise ConfigError("block_device_driver = virtio-scsi needs PCI; a microvm without it has virtio-blk")
    return True


def _iothreads(settings):
    return max(1, settings.indep_iothreads) if settings.enable_iothreads else 0


def _disk_aio(settings):
    wanted = settings.block_device_aio or "threads"
    if wanted == "io_uring" and not (verdict := host.io_uring_available()).usable:
        log.warning("block_device_aio = io_uring: %s; threads are used instead", verdict.why)
        return "threads"
    if wanted == "native" and not (settings.block_device_cache_set and settings.block_device_cache_direct):
        raise ConfigError("block_device_aio = native needs block_device_cache_set and "
                          "block_device_cache_direct")
    return wanted


def _disk_cache(settings):
    if not settings.block_device_cache_set:
        return None
    return {"direct": settings.block_device_cache_direct, "no-flush": settings.block_device_cache_noflush}


def _queue_size(settings):
    size = settings.queue_size
    if size & (size - 1):
        raise ConfigError(f"queue_size = {size} is not a power of two")
    return size
