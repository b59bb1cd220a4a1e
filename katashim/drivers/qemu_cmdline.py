"""QEMU's command line: pure functions from a Plan and devices to a list of arguments.

Tested against golden files (test/drivers/test_qemu_cmdline.py). The order of the kernel's parameters
is Kata's: defaults, root filesystem, the user's, SELinux. Source of the options: qemu-system-x86_64(1)
of QEMU 7.2; JSON for ``-device`` needs 6.2. Called by katashim.drivers.qemu.
"""

import json

from katashim.drivers import qemu_devices
from katashim.drivers.qemu_devices import virtio

MEMORY_ID = "memory0"

# -- parameters of the guest's kernel -------------------------------------------------------------
_COMMON = ("systemd.unit=kata-containers.target systemd.mask=systemd-networkd.service "
           "systemd.mask=systemd-networkd.socket "
           # The host's clock is good; time spent on testing timers, SMP locks and crypto is lost.
           "tsc=reliable no_timer_check noreplace-smp cryptomgr.notests random.trust_cpu=on "
           "net.ifnames=0 rcupdate.rcu_expedited=1")

# Under QEMU's emulator (TCG). Of many parameters tried, these two and _cpu()'s are what can be measured.
_TCG = ("mitigations=off "              # the emulator has no speculation to guard against
        "clearcpuid=rep_good")          # it runs `rep stos` slower than a plain loop

_ROOT_FLAGS = {"ext4": "rootflags=data=ordered,errors=remount-ro "}


def kernel_params(plan):
    """The guest kernel's command line."""
    # A microvm has no keyboard controller to reset it by; a triple fault works everywhere.
    words = ["reboot=t" if plan.machine == "microvm" else "reboot=k", "panic=1", _COMMON,
             *_accel_params(plan), "console=ttyS0", "" if plan.debug else "quiet",
             _root_params(plan), plan.kernel_params, f"selinux={int(plan.selinux)}"]
    return " ".join(word for word in words if word)


def _accel_params(plan):
    if plan.accel != "tcg":
        return []
    words = [_TCG]
    if plan.tsc_khz:
        # The guest sees the host's counter. A microvm has nothing to calibrate it by and, left to
        # try, its kernel spins for ever in one boot of seven.
        words.append(f"tsc_early_khz={plan.tsc_khz}")
    if plan.machine == "q35" or not plan.acpi:
        # Saves calibrating the local APIC's timer. Needs another timer, HPET or PIT: a microvm with
        # ACPI has none and would never wake up again.
        words.append("nolapic_timer")
    return words


def _root_params(plan):
    if not plan.image:
        return ""
    flags = _ROOT_FLAGS.get(plan.rootfs_type, "")
    return f"root={plan.image_device} {flags}ro rootfstype={plan.rootfs_type}"


# -- the whole command line -----------------------------------------------------------------------
def command_line(plan, sandbox_id, *, qmp_fd, console_fd, devices):
    """QEMU's argv.

    :param plan: a katashim.drivers.qemu_plan.Plan.
    :param qmp_fd: listening unix socket that QEMU inherits.
    :param console_fd: connected socket for the guest's console, inherited too.
    :param devices: arguments made by the functions below, in the order in which the guest finds them.
    """
    return [plan.program, "-name", f"sandbox-{_escape(sandbox_id)},debug-threads=on",
            "-machine", _machine(plan), "-cpu", _cpu(plan), "-smp", _smp(plan), *_memory(plan),
            *_kernel(plan),
            "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
            "-chardev", f"socket,id=qmp,fd={qmp_fd},server=on,wait=off",
            "-mon", "chardev=qmp,mode=control",
            "-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console",
            "-rtc", "base=utc,clock=host,driftfix=slew",
            *(["-global", "virtio-mmio.force-legacy=false"] if not plan.pci else []),
            *(["-sandbox", plan.sandbox] if plan.sandbox else []),
            *devices]


def _machine(plan):
    options = [plan.machine, f"accel={plan.accel}"]
    if plan.machine == "microvm":
        options += ["rtc=on", "ioapic2=on", f"acpi={'on' if plan.acpi else 'off'}"]
        if plan.acpi:
            # A kernel under a microvm's (hardware-reduced) ACPI sets neither up. Left ticking since
            # the firmware, as with QEMU 10, they interrupt it with vector 0, the division error.
            options += ["pit=off", "pic=off"]
    else:
        options += ["graphics=off", "sata=off", "smbus=off", "usb=off", "vmport=off", "smm=off"]
    if plan.accel == "kvm" and plan.machine == "q35":
        options.append("kernel_irqchip=on")
    options.append(f"memory-backend={MEMORY_ID}")
    return ",".join(options + [plan.machine_options] if plan.machine_options else options)


def _cpu(plan):
    # erms and fsrm make kernel and C library prefer `rep movsb`, the slowest copy that TCG has.
    model = "host" if plan.accel == "kvm" else "max,erms=off,fsrm=off"
    return f"{model},{plan.cpu_features}" if plan.cpu_features else model


def _smp(plan):
    # One socket to a vCPU, so that each can be plugged on its own.
    if plan.max_vcpus == plan.vcpus:
        return f"{plan.vcpus},sockets={plan.vcpus},cores=1,threads=1"
    return f"{plan.vcpus},sockets={plan.max_vcpus},cores=1,threads=1,maxcpus={plan.max_vcpus}"


def _memory(plan):
    size = f"{plan.memory_mb}M"
    if plan.memory_slots:
        size += f",slots={plan.memory_slots},maxmem={plan.max_memory_mb}M"
    backend = memory_backend(plan, MEMORY_ID, plan.memory_mb)
    return ["-m", size, "-object", json_text(backend)]


def memory_backend(plan, backend_id, size_mb):
    """The memory object of the guest's RAM or of one DIMM (``-object``, ``object-add``)."""
    in_file = plan.shared_memory or plan.hugepages
    backend = {"qom-type": "memory-backend-memfd" if in_file else "memory-backend-ram",
               "id": backend_id, "size": size_mb << 20}
    if in_file:
        backend["share"] = plan.shared_memory
    if plan.hugepages:
        backend["hugetlb"] = True
    if plan.prealloc:
        backend["prealloc"] = True
    return backend


def _kernel(plan):
    return [*(["-bios", plan.firmware] if plan.firmware else []),
            "-kernel", plan.kernel,
            *(["-initrd", plan.initrd] if plan.initrd else []),
            "-append", kernel_params(plan)]


# -- devices --------------------------------------------------------------------------------------
def system_devices(plan, slots):
    """What every VM has: bridges, random numbers, SCSI controller, I/O threads, balloon."""
    devices = []
    for number, (bridge, slot) in enumerate(slots.bridges):
        devices += device(qemu_devices.bridge_device(number, bridge, slot))
    devices += obj({"qom-type": "rng-random", "id": "rng0", "filename": plan.entropy_source})
    devices += device({"driver": virtio("virtio-rng", plan.pci), "id": "rng-device", "rng": "rng0",
                       **slots.at_boot()})
    for number in range(plan.iothreads):
        devices += obj({"qom-type": "iothread", "id": f"iothread{number}"})
    if plan.scsi:
        thread = {"iothread": "iothread0"} if plan.iothreads else {}
        devices += device({"driver": virtio("virtio-scsi", plan.pci), "id": "scsi0", **thread,
                           **slots.at_boot()})
    if plan.free_page_reporting:
        devices += device({"driver": virtio("virtio-balloon", plan.pci), "id": "balloon0",
                           "free-page-reporting": True, **slots.at_boot()})
    return devices


def device(properties):
    """``-device`` from a dict."""
    return ["-device", json_text(properties)]


def obj(properties):
    """``-object`` from a dict."""
    return ["-object", json_text(properties)]


def blockdev(node):
    """``-blockdev`` from a dict."""
    return ["-blockdev", json_text(node)]


def chardev_socket(chardev_id, path):
    """``-chardev`` that connects to a vhost-user daemon's socket."""
    return ["-chardev", f"socket,id={chardev_id},path={_escape(path)}"]


def netdev(properties):
    """``-netdev`` from a dict (in QEMU's older syntax: JSON is read only since 7.2)."""
    words = [properties["type"]]
    for name, value in properties.items():
        if name != "type":
            words.append(f"{name}={'on' if value is True else value}")
    return ["-netdev", ",".join(words)]


def json_text(properties):
    """A dict as one argument."""
    return json.dumps(properties, separators=(",", ":"))


def _escape(text):
    """For options of the form a=b,c=d, in which a comma is written twice."""
    return text.replace(",", ",,")
