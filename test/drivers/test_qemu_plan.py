"""What settings and host come to: every decision, and every refusal with the setting's name in it."""

import struct

import pytest

from katashim import host
from katashim.config.records import Hypervisor
from katashim.drivers import qemu_plan
from katashim.drivers.qemu_plan import is_partitioned, make_plan
from katashim.errors import ConfigError, Unsupported

QEMU = "/usr/bin/qemu-system-x86_64"
GOOD_KVM = host.Verdict(True, "KVM runs a guest's kernel natively")
BAD_KVM = host.Verdict(False, "there is no /dev/kvm")


@pytest.fixture
def files(tmp_path):
    """Paths of a kernel, an image without partitions and an initrd."""
    for name in ("vmlinux", "image", "initrd"):
        (tmp_path / name).write_bytes(b"\x7fELF" + bytes(2000))
    return {name: str(tmp_path / name) for name in ("vmlinux", "image", "initrd")}


@pytest.fixture
def settings(files):
    """``settings(**changes)`` -> a hypervisor record that works here."""
    def make(**changes):
        values = {"path": QEMU, "kernel": files["vmlinux"], "initrd": files["initrd"], "accel": "tcg",
                  "default_memory": 256, "default_maxmemory": 256, "default_vcpus": 1.0,
                  "default_maxvcpus": 1}
        return Hypervisor(**{**values, **changes})
    return make


# -- refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("changes", "says"), [
    ({"path": "/no/qemu"}, "path = /no/qemu: there is no such program; install QEMU"),
    ({"path": "/etc/passwd"}, "path = /etc/passwd: it cannot be executed"),
    ({"path": ""}, "path names no QEMU program"),
    ({"machine_type": "virt"}, "machine_type = virt: this driver has q35 and microvm"),
    ({"kernel": "/no/kernel"}, "kernel = /no/kernel: No such file or directory"),
    ({"kernel": "/etc"}, "kernel = /etc: Is a directory"),
    ({"kernel": ""}, "kernel is not set"),
    ({"initrd": "/no/initrd"}, "initrd = /no/initrd: No such file or directory"),
    ({"initrd": "", "image": "/no/image"}, "image = /no/image: No such file or directory"),
    ({"initrd": ""}, "neither image nor initrd is set"),
    ({"image": "/etc/passwd"}, "image and initrd are both set"),
    ({"boot_initrd": "/etc/passwd"}, "boot_initrd is set without image"),
    ({"default_vcpus": 3.0}, "default_vcpus = 3 is more than default_maxvcpus = 1"),
    ({"default_memory": 32}, "default_memory = 32 MiB is less than 64 MiB"),
    ({"default_memory": 512}, "default_memory = 512 MiB is more than default_maxmemory = 256 MiB"),
    ({"default_bridges": 6}, "default_bridges = 6 is more than 5"),
    ({"queue_size": 100}, "queue_size = 100 is not a power of two"),
    ({"machine_type": "microvm", "block_device_driver": "virtio-scsi"}, "virtio-scsi needs PCI"),
    ({"block_device_aio": "native"}, "block_device_aio = native needs block_device_cache_set"),
])
def test_impossible_settings_are_named(settings, changes, says):
    with pytest.raises(ConfigError) as caught:
        make_plan(settings(**changes))
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["confidential_guest", "rootless"])
def test_promised_protection_is_never_passed_over(settings, name):
    with pytest.raises(Unsupported, match=name):
        make_plan(settings(**{name: True}))


def test_hugepages_that_are_not_there(settings, monkeypatch):
    monkeypatch.setattr(host, "hugepages_free_mb", lambda: 100)
    with pytest.raises(ConfigError, match="100 MiB of free huge pages, the VM needs 256 MiB"):
        make_plan(settings(enable_hugepages=True))
    monkeypatch.setattr(host, "hugepages_free_mb", lambda: 256)
    assert make_plan(settings(enable_hugepages=True)).hugepages


# -- accelerator and clock ------------------------------------------------------------------------
def test_auto_takes_kvm_where_it_works(settings, monkeypatch):
    monkeypatch.setattr(host, "kvm_usable", lambda: GOOD_KVM)
    plan = make_plan(settings(accel="auto"))
    assert (plan.accel, plan.accel_why, plan.tsc_khz) == ("kvm", GOOD_KVM.why, 0)


def test_auto_falls_back_and_says_why(settings, monkeypatch):
    monkeypatch.setattr(host, "kvm_usable", lambda: BAD_KVM)
    monkeypatch.setattr(host, "tsc_khz", lambda: 2600000)
    plan = make_plan(settings(accel="auto"))
    assert (plan.accel, plan.accel_why, plan.tsc_khz) == ("tcg", BAD_KVM.why, 2600000)


def test_kvm_can_be_demanded(settings, monkeypatch):
    monkeypatch.setattr(host, "kvm_usable", lambda: BAD_KVM)
    with pytest.raises(ConfigError, match="accel = kvm: there is no /dev/kvm"):
        make_plan(settings(accel="kvm"))


def test_without_a_measured_clock_only_q35_is_safe(settings, monkeypatch):
    def unreadable():
        raise Unsupported("executable memory is forbidden")

    monkeypatch.setattr(host, "tsc_khz", unreadable)
    assert make_plan(settings()).tsc_khz == 0
    with pytest.raises(ConfigError, match="machine_type = microvm: .* use machine_type = q35"):
        make_plan(settings(machine_type="microvm"))


# -- machine --------------------------------------------------------------------------------------
def test_q35(settings):
    plan = make_plan(settings(default_bridges=2))
    assert (plan.machine, plan.pci, plan.acpi, plan.hotplug, plan.bridges) == ("q35", True, True, True, 2)


def test_a_microvm_has_acpi_unless_the_kernel_can_do_without(settings, tmp_path):
    plan = make_plan(settings(machine_type="microvm"))
    assert (plan.pci, plan.acpi, plan.hotplug, plan.bridges) == (False, True, False, 0)
    fast = tmp_path / "fast"
    fast.write_bytes(b"\x7fELF" + bytes(5000) + b"virtio_mmio.device\0" + bytes(100))
    assert not make_plan(settings(machine_type="microvm", kernel=str(fast))).acpi
    assert make_plan(settings(kernel=str(fast))).acpi, "q35 needs it for hotplug"
    packed = tmp_path / "bzImage"
    packed.write_bytes(b"MZ" + bytes(5000) + b"virtio_mmio.device\0")
    assert make_plan(settings(machine_type="microvm", kernel=str(packed))).acpi


def test_a_microvm_with_pci_on_demand(settings):
    plan = make_plan(settings(machine_type="microvm", machine_accelerators="pcie=on",
                              block_device_driver="virtio-scsi"))
    assert (plan.pci, plan.acpi, plan.hotplug, plan.scsi) == (True, True, False, True)


def test_vcpus_are_whole_and_bounded(settings, monkeypatch):
    monkeypatch.setattr(host, "online_cpus", lambda: 8)

    def vcpus(**changes):
        plan = make_plan(settings(**changes))
        return plan.vcpus, plan.max_vcpus

    assert vcpus(default_vcpus=1.2, default_maxvcpus=4) == (2, 4)
    assert vcpus(default_vcpus=0.0, default_maxvcpus=0) == (1, 8)
    assert vcpus(default_vcpus=-1.0, default_maxvcpus=0) == (8, 8)
    assert vcpus(default_vcpus=2.0, default_maxvcpus=4, machine_type="microvm") == (2, 2)


def test_memory_slots_only_where_memory_can_grow(settings):
    def memory(**changes):
        plan = make_plan(settings(**changes))
        return plan.memory_mb, plan.max_memory_mb, plan.memory_slots

    assert memory() == (256, 256, 0)
    assert memory(default_maxmemory=1024, memory_slots=10) == (256, 1024, 10)
    assert memory(default_maxmemory=1024, memory_slots=1000)[2] == 255
    assert memory(default_maxmemory=1024, memory_slots=0) == (256, 256, 0)
    assert memory(default_maxmemory=1024, machine_type="microvm") == (256, 256, 0)


def test_io_uring_is_used_only_where_the_kernel_allows_it(settings, monkeypatch):
    monkeypatch.setattr(host, "io_uring_available", lambda: host.Verdict(False, "forbidden"))
    assert make_plan(settings(block_device_aio="io_uring")).disk_aio == "threads"
    monkeypatch.setattr(host, "io_uring_available", lambda: host.Verdict(True, "works"))
    assert make_plan(settings(block_device_aio="io_uring")).disk_aio == "io_uring"


def test_disk_cache_settings_count_only_when_switched_on(settings):
    assert make_plan(settings(block_device_cache_direct=True)).disk_cache is None
    plan = make_plan(settings(block_device_cache_set=True, block_device_cache_direct=True,
                              block_device_aio="native"))
    assert plan.disk_cache == {"direct": True, "no-flush": False} and plan.disk_aio == "native"


# -- root filesystem ------------------------------------------------------------------------------
def test_an_image_may_have_a_small_initrd_before_it(settings, files):
    plan = make_plan(settings(initrd="", image=files["image"], boot_initrd=files["initrd"], rootfs_type="erofs"))
    assert (plan.image, plan.initrd, plan.image_device, plan.rootfs_type) == (
        files["image"], files["initrd"], "/dev/vda", "erofs")


def test_a_partitioned_image_is_booted_from_its_first_partition(settings, tmp_path):
    image = tmp_path / "kata.img"
    image.write_bytes(mbr(entry()))
    assert make_plan(settings(initrd="", image=str(image))).image_device == "/dev/vda1"


def entry(flag=0, kind=0x83, sectors=1000):
    return struct.pack("<B3xB3xII", flag, kind, 2048, sectors)


def mbr(*entries):
    return (bytes(446) + b"".join(entries)).ljust(510, b"\0") + b"\x55\xaa" + bytes(2048)


@pytest.mark.parametrize(("content", "answer"), [
    (mbr(entry()), True),
    (mbr(entry(flag=0x80), entry()), True),
    (bytes(512) + b"EFI PART" + bytes(1024), True),
    (mbr(entry(kind=0xEE)), True),
    (mbr(), False),                                     # a boot signature alone
    (mbr(entry(flag=0x12)), False),                     # code where the table would be
    (mbr(entry(sectors=0)), False),
    (bytes(1024) + struct.pack("<I", 0xE0F5E1E2) + bytes(1024), False),     # EROFS
    (bytes(1024 + 56) + b"\x53\xef" + bytes(1024), False),                  # ext4
    (b"hsqs" + bytes(2048), False),                                         # squashfs
    (b"", False),
], ids=["mbr", "mbr-active", "gpt", "protective", "signature", "code", "empty-entry", "erofs", "ext4",
        "squashfs", "nothing"])
def test_partition_tables_are_told_from_filesystems(tmp_path, content, answer):
    image = tmp_path / "image"
    image.write_bytes(content)
    assert is_partitioned(str(image)) is answer


def test_a_real_filesystem_is_not_partitioned(tmp_path):
    import subprocess
    image = tmp_path / "ext4"
    with open(image, "wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", str(image)], check=True)
    assert not is_partitioned(str(image))
    with open(image, "r+b") as file:
        file.write(mbr(entry())[:512])
    assert is_partitioned(str(image))


def test_a_missing_kernel_has_no_abilities():
    assert not qemu_plan.announces_mmio_by_cmdline("/no/kernel")
