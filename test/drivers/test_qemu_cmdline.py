"""QEMU's command line: golden files, one argument a line.

After a change that is meant: ``PYTHONPATH=. python test/drivers/test_qemu_cmdline.py`` writes them anew.
"""

import os
import types

import pytest

from katashim.drivers import base, qemu_cmdline, qemu_devices
from katashim.drivers.qemu_plan import Plan

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")

KERNEL_VSOCK = types.SimpleNamespace(kind="kernel", cid=77, vhost_fd=9)
VHOST_USER_VSOCK = types.SimpleNamespace(kind="vhost-user", chardev_path="/run/kata/x/vhost-vsock.sock")
SHARE = base.ShareFs("kataShared", "/run/kata/x/virtio,fs.sock")
DISK = base.Disk("data", "/dev/null", serial="data")
NIC = base.Nic("eth0", "tap0_kata", "02:00:00:00:00:01", fds=(12,))
MULTIQUEUE = base.Nic("eth1", "tap1_kata", "02:00:00:00:00:02", fds=(12, 13), vhost_fds=(14, 15), queue_size=512)

BASE = Plan(program="/usr/bin/qemu-system-x86_64", machine="q35", accel="tcg", accel_why="", pci=True,
            acpi=True, kernel="/g/vmlinux", kernel_params="agent.log=debug user=1")


def node(name, path="/g/rootfs.img", driver="file"):
    return {"driver": driver, "node-name": name, "filename": path, "aio": "threads", "read-only": True,
            "discard": "ignore"}


def compose(plan, *, vsock, share=None, nics=(), disks=0, sandbox_id="x"):
    """The command line of a VM with these devices, as katashim.drivers.qemu puts it together."""
    slots = qemu_devices.Slots(plan.pci, plan.bridges)
    args = qemu_cmdline.system_devices(plan, slots)
    if vsock.kind == "vhost-user":
        args += qemu_cmdline.chardev_socket("vsock", vsock.chardev_path)
    args += qemu_cmdline.device(qemu_devices.vsock_device(vsock, plan.pci, slots.at_boot()))
    for number in range(disks):
        disk = DISK._replace(readonly=number == 0)
        args += qemu_cmdline.blockdev(node(f"disk{number}"))
        if plan.scsi:
            device = qemu_devices.scsi_disk(f"disk{number}-device", f"disk{number}", disk, number)
        else:
            device = qemu_devices.blk_device(
                f"disk{number}-device", f"disk{number}", disk, plan.pci, slots.at_boot(),
                queues=plan.disk_queues, queue_size=plan.disk_queue_size,
                iothread="iothread0" if plan.iothreads else "", sector_sizes=plan.sector_sizes)
        args += qemu_cmdline.device(device)
    for number, nic in enumerate(nics):
        args += qemu_cmdline.netdev(qemu_devices.tap_backend(f"nic{number}", nic.fds, nic.vhost_fds))
        args += qemu_cmdline.device(qemu_devices.net_device(
            f"nic{number}-device", f"nic{number}", nic, plan.pci, slots.at_boot()))
    if share:
        args += qemu_cmdline.chardev_socket("share0", share.socket_path)
        args += qemu_cmdline.device(qemu_devices.fs_device("share0", share, plan.pci, slots.at_boot()))
    return qemu_cmdline.command_line(plan, sandbox_id, qmp_fd=5, console_fd=6, devices=args)


WITH_IMAGE = {"initrd": "/g/initrd.img", "image": "/g/rootfs.img", "image_device": "/dev/vda",
              "rootfs_type": "erofs"}

CASES = {
    # The packaged default where KVM is missing.
    "q35-tcg": lambda: compose(
        BASE._replace(**WITH_IMAGE, tsc_khz=2600000, shared_memory=True, bridges=1, vcpus=1, max_vcpus=4,
                      memory_mb=512, max_memory_mb=4096, memory_slots=16),
        vsock=VHOST_USER_VSOCK, share=SHARE, nics=[NIC], disks=2),
    # A stock Kata image (partitioned) with KVM and the kernel's vsock, nothing to be plugged in later.
    "q35-kvm-kata-image": lambda: compose(
        BASE._replace(accel="kvm", image="/g/kata.img", image_device="/dev/vda1", vcpus=2, max_vcpus=2,
                      selinux=True),
        vsock=KERNEL_VSOCK, nics=[MULTIQUEUE], disks=1),
    # Every option that changes something.
    "q35-kvm-everything": lambda: compose(
        BASE._replace(accel="kvm", initrd="/g/kata.initrd", scsi=True, iothreads=2, bridges=2, hugepages=True,
                      prealloc=True, shared_memory=True, free_page_reporting=True, debug=True,
                      machine_options="nvdimm=off", cpu_features="pmu=off", firmware="/g/OVMF.fd",
                      sandbox="on,obsolete=deny", entropy_source="/dev/hwrng"),
        vsock=KERNEL_VSOCK, share=SHARE, disks=3, sandbox_id="a,b"),
    # The fastest start without KVM: a kernel that needs no ACPI.
    "microvm-tcg-no-acpi": lambda: compose(
        BASE._replace(**WITH_IMAGE, machine="microvm", pci=False, acpi=False, tsc_khz=2600000,
                      shared_memory=True),
        vsock=VHOST_USER_VSOCK, share=SHARE, nics=[NIC], disks=2),
    # Debian's kernel on a microvm: it finds virtio-mmio by ACPI only.
    "microvm-tcg-acpi": lambda: compose(
        BASE._replace(**WITH_IMAGE, machine="microvm", pci=False, tsc_khz=2600000, shared_memory=True),
        vsock=VHOST_USER_VSOCK, nics=[MULTIQUEUE]),
    "microvm-kvm-pcie": lambda: compose(
        BASE._replace(machine="microvm", accel="kvm", machine_options="pcie=on", initrd="/g/i", iothreads=1,
                      disk_queues=2, disk_queue_size=256, sector_sizes=(512, 4096)),
        vsock=KERNEL_VSOCK, disks=1),
}


def as_text(argv):
    return "\n".join(argv) + "\n"


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    with open(f"{GOLDEN}/{case}.txt") as file:
        assert as_text(CASES[case]()) == file.read()


def test_the_order_of_the_kernels_parameters_is_katas():
    """Defaults, root filesystem, the user's, SELinux: the later word wins in the kernel."""
    params = qemu_cmdline.kernel_params(BASE._replace(**WITH_IMAGE))
    places = [params.index(word) for word in ("reboot=k", "root=/dev/vda ro", "user=1", "selinux=0")]
    assert places == sorted(places)


def test_an_ext4_root_gets_katas_flags():
    params = qemu_cmdline.kernel_params(BASE._replace(image="/i", image_device="/dev/vda1"))
    assert "root=/dev/vda1 rootflags=data=ordered,errors=remount-ro ro rootfstype=ext4" in params


def test_an_initrd_alone_has_no_root_parameters():
    assert "root=" not in qemu_cmdline.kernel_params(BASE._replace(initrd="/i"))


@pytest.mark.parametrize(("machine", "acpi", "accel", "has"), [
    ("q35", True, "tcg", True), ("microvm", False, "tcg", True), ("microvm", True, "tcg", False),
    ("q35", True, "kvm", False)])
def test_the_apic_timer_is_given_up_only_where_another_timer_is_left(machine, acpi, accel, has):
    """On a microvm with ACPI there is none, and a guest told so would never wake up again."""
    params = qemu_cmdline.kernel_params(BASE._replace(machine=machine, acpi=acpi, accel=accel))
    assert ("nolapic_timer" in params.split()) is has


def test_kvm_guests_get_none_of_the_emulators_cures():
    words = qemu_cmdline.kernel_params(BASE._replace(accel="kvm", tsc_khz=0)).split()
    assert not [word for word in words if word.startswith(("mitigations", "clearcpuid", "tsc_early"))]


def write_golden():
    for case, argv in CASES.items():
        with open(f"{GOLDEN}/{case}.txt", "w") as file:
            file.write(as_text(argv()))


if __name__ == "__main__":
    write_golden()
