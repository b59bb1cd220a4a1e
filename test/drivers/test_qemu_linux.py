"""The QEMU driver with Linux in the guest: does the guest see what the driver says it plugged?

The guest is the reference guest's kernel and small initrd with another /init laid over it, a shell
script that prints what it sees of the hardware whenever that changes.
"""

import os
import re

import pytest
from qemu_vm import LONG, Machine, disk, disk_file, tiny_settings

from katashim.agent.client import Agent
from katashim.drivers import base
from katashim.guest.initrd import Archive

GUEST = os.environ.get("KATASHIM_GUEST", "/var/lib/katashim/guest")
KERNEL, INITRD, ROOTFS = f"{GUEST}/vmlinux", f"{GUEST}/initrd.img", f"{GUEST}/rootfs.img"

pytestmark = [pytest.mark.vm, pytest.mark.skipif(not os.path.exists(KERNEL), reason=f"no guest in {GUEST}")]

INIT = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
read -r modules </modules
modprobe -a $modules
for word in $(cat /proc/cmdline); do
    case $word in
        then=panic) echo "about to panic"; exit 1 ;;
        then=poweroff) echo "about to power off"; poweroff -f ;;
    esac
done
old=
while :; do
    new="cpus $(cat /sys/devices/system/cpu/present)
blocks $(ls -d /sys/devices/system/memory/memory* | wc -l)"
    for card in $(grep -l 0x020000 /sys/bus/pci/devices/*/class); do
        new="$new
card $(readlink -f ${card%/class})"
    done
    for disk in /sys/block/vd*; do
        [ -e $disk/size ] && new="$new
disk ${disk#/sys/block/} $(cat $disk/serial) sectors=$(cat $disk/size) ro=$(cat $disk/ro) $(readlink -f $disk/device)"
    done
    [ "$new" = "$old" ] || echo "SEEN
$new
END"
    old=$new
    sleep 0.05
done
"""


@pytest.fixture
def machine(tmp_path):
    """``machine(**settings)`` -> a Machine whose guest runs INIT; ended with the test."""
    machines = []
    archive = Archive()
    archive.file("init", INIT.encode(), 0o755)
    with open(INITRD, "rb") as file, open(tmp_path / "initrd", "wb") as laid_over:
        laid_over.write(file.read() + archive.bytes())      # the kernel unpacks one after the other

    def make(**settings):
        run_dir = tmp_path / f"run{len(machines)}"
        run_dir.mkdir()
        defaults = {"kernel": KERNEL, "initrd": str(tmp_path / "initrd"), "default_memory": 256,
                    "default_maxmemory": 256}
        machines.append(Machine(run_dir, tiny_settings(run_dir, **{**defaults, **settings})))
        return machines[-1]

    yield make
    for one in machines:
        one.end()


def seen(one):
    """The guest's latest complete report: its lines."""
    reports = re.findall(r"SEEN\n(.*?)\nEND", one.vm.console_tail(), re.DOTALL)
    return reports[-1].splitlines() if reports else []


def wait_seen(one, wanted, present=True):
    """Wait until the guest's latest report has (or has not) a line matching `wanted`; returns it."""
    import time

    import gevent
    end = time.monotonic() + LONG
    while True:
        found = next((line for line in seen(one) if re.search(wanted, line)), None)
        if (found is not None) is present:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"the guest still sees {seen(one)}, waiting for {wanted} ({present})")
        gevent.sleep(0.02)


def sysfs_path(guest_address):
    """Where the agent looks for a PCI path: /devices/pci0000:00/0000:00:BB.0/0000:XX:SS.0."""
    slots = guest_address.split("/")
    return "/0000:00:" + slots[0] + r"\.0" + "".join(rf"/0000:\w\w:{slot}\.0" for slot in slots[1:])


def test_plugging_and_unplugging_as_the_guest_sees_it(machine, tmp_path):
    one = machine(default_maxvcpus=3, default_maxmemory=1024, default_bridges=2)
    one.boot(says="SEEN")
    blocks = int(wait_seen(one, "^blocks").split()[1])

    first = one.vm.add_device(disk(tmp_path, "a", serial="first"))
    second = one.vm.add_device(disk(tmp_path, "b", serial="second", readonly=True))
    wait_seen(one, f"disk vd. first sectors=2048 ro=0 .*{sysfs_path(first.guest_address)}/virtio")
    wait_seen(one, f"disk vd. second sectors=2048 ro=1 .*{sysfs_path(second.guest_address)}/virtio")

    one.vm.remove_device(first)
    wait_seen(one, "disk vd. first", present=False)
    assert "disk0" not in [entry["node-name"] for entry in one.qmp("query-named-block-nodes")]
    wait_seen(one, "disk vd. second")
    again = one.vm.add_device(disk(tmp_path, "a", serial="again"))
    assert again.guest_address == first.guest_address, "the place was given back"
    wait_seen(one, f"disk vd. again .*{sysfs_path(again.guest_address)}/virtio")

    assert one.vm.resize_vcpus(3) == 3
    wait_seen(one, "^cpus 0-2$")
    assert one.vm.resize_vcpus(1) == (3 if one.vm.plan.accel == "tcg" else 1), "TCG's QEMU would not survive"
    assert one.vm.resize_memory(300) == 384
    wait_seen(one, f"^blocks {blocks + 1}$")


def test_a_card_is_plugged_and_unplugged(machine):
    import fcntl
    import struct
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"ktlinux%d", 0x5002))      # TUNSETIFF
        one = machine()
        one.boot(says="SEEN")
        card = one.vm.add_device(base.Nic("eth0", "tap", "02:00:00:00:00:01", fds=(tap,)))
        wait_seen(one, f"card .*{sysfs_path(card.guest_address)}$")
        one.vm.remove_device(card)
        wait_seen(one, "card ", present=False)
        assert one.vm.add_device(card._replace(id="eth1")).guest_address == card.guest_address
        wait_seen(one, f"card .*{sysfs_path(card.guest_address)}$")
    finally:
        os.close(tap)


@pytest.mark.parametrize("kind", ["q35", "microvm"])
def test_disks_at_boot_have_the_names_that_the_driver_says(machine, tmp_path, kind):
    image = disk_file(tmp_path, "image", megabytes=3)
    one = machine(machine_type=kind, initrd="", image=image, boot_initrd=str(tmp_path / "initrd"))
    added = one.boot(*[disk(tmp_path, name, serial=f"serial-{name}") for name in "cab"], says="SEEN")
    wait_seen(one, r"disk vda +sectors=6144 ro=1")
    for device in added:
        wait_seen(one, f"disk {os.path.basename(device.guest_address)} {device.serial} ")


@pytest.mark.parametrize("kind", ["q35", "microvm"])
def test_a_guest_that_powers_off(machine, kind):
    one = machine(machine_type=kind, kernel_params="then=poweroff")
    one.boot(says="")
    ended = one.vm.wait(LONG)
    assert ended is not None and ended.status == 0, one.vm.console_tail()
    assert ended.reason == "exited with status 0 after guest-shutdown"


@pytest.mark.parametrize("kind", ["q35", "microvm"])
def test_a_guest_that_panics(machine, kind):
    one = machine(machine_type=kind, kernel_params="then=panic")
    one.boot(says="")
    ended = one.vm.wait(LONG)
    assert ended is not None and ended.status == 0, one.vm.console_tail()
    assert "Kernel panic" in one.vm.console_tail()


@pytest.mark.parametrize(("kind", "vcpus"), [("q35", 1), ("q35", 2), ("microvm", 1), ("microvm", 2)])
def test_the_reference_guests_agent_answers(machine, kind, vcpus):
    one = machine(machine_type=kind, initrd="", image=ROOTFS, boot_initrd=INITRD, rootfs_type="erofs",
                  default_memory=512, default_maxmemory=512, default_vcpus=float(vcpus), default_maxvcpus=vcpus)
    one.boot(says="")
    agent = Agent(one.vm.agent_address())
    try:
        agent.connect(30, alive=lambda: one.vm.wait(0) is None)
    finally:
        agent.close()
    one.vm.console_tail()
    assert one.vm.console.mark_at is not None, one.vm.console_tail()
    assert sorted(one.vm.vcpu_threads()) == list(range(vcpus))
