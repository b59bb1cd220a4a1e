import pytest

from katashim.config import InvalidConfig
from katashim.config.validate import missing_files

VERITY = "root_hash=ab,salt=cd,data_blocks=10,data_block_size=4096,hash_block_size=4096"


def problems_of(disk, *args, **kwargs):
    with pytest.raises(InvalidConfig) as caught:
        disk.toml(*args, **kwargs)
    return caught.value.problems


@pytest.mark.parametrize(("hypervisor", "problem"), [
    ('initrd = "/r"', "image and initrd are both set (image at"),
    ('jailer_path = "/j"', "the qemu driver refuses jailer_path: QEMU has no jailer"),
    ("enable_guest_swap = true", "the qemu driver refuses enable_guest_swap"),
    ('vm_rootfs_driver = "virtio-blk-mmio"',
     "the qemu driver cannot have vm_rootfs_driver = virtio-blk-mmio"),
    ('block_device_driver = "virtio-mmio"',
     "the qemu driver cannot have block_device_driver = virtio-blk-mmio"),
    ('machine_type = "q36"', 'machine_type is "q36", must be one of q35, microvm'),
    ("pcie_root_port = 1\npcie_switch_port = 1", "pcie_root_port and pcie_switch_port exclude each other"),
    ("default_bridges = 6", "default_bridges is 6, must be 0 to 5"),
    ("default_memory = 63", "default_memory is 63 MiB, the qemu driver needs 64 or more"),
    ("default_memory = 512\ndefault_maxmemory = 256",
     "default_memory is 512 MiB, more than default_maxmemory, 256"),
    ("default_vcpus = 4\ndefault_maxvcpus = 2", "default_vcpus is 4, more than default_maxvcpus, 2"),
    ("virtio_fs_queue_size = 1000", "virtio_fs_queue_size is 1000, must be a power of two"),
    ("virtio_fs_queue_size = 2048", "virtio_fs_queue_size is 2048, must be 2 to 1024"),
    ("queue_size = 100", "queue_size is 100, must be a power of two"),
    ("block_device_logical_sector_size = 256", "must be 0 or a power of two from 512"),
    ("block_device_physical_sector_size = 1000", "must be 0 or a power of two from 512"),
    ("block_device_logical_sector_size = 4096\nblock_device_physical_sector_size = 512",
     "block_device_logical_sector_size 4096 is more than block_device_physical_sector_size 512"),
    ('shared_fs = "virtio-fs"\nconfidential_guest = true', "a confidential guest shares no memory"),
    ("disable_block_device_use = true", "nothing can carry a root filesystem"),
    ("kernel_params = 'a=\"b c'", "a quote is not closed"),
    ('kernel_verity_params = "root_hash=ab"', "needs the field salt once"),
    (f'kernel_verity_params = "{VERITY},salt=x"', "needs the field salt once"),
    (f'kernel_verity_params = "{VERITY},pepper=x"', 'has the unknown field "pepper"'),
    (f'kernel_verity_params = "{VERITY.replace("=10", "=0")}"', "data_blocks must be a number above 0"),
    ('guest_extension_images = [{name = "a b", path = "/p"}]', 'name is "a b", must be letters'),
    ('guest_extension_images = [{name = "a", path = "/p"}, {name = "a", path = "/q"}]', "has a twice"),
    ('guest_extension_images = [{name = "a", path = "p"}]', "a needs an absolute path"),
])
def test_hypervisor_rules(disk, hypervisor, problem):
    problems = problems_of(disk, hypervisor)
    assert any(problem in one for one in problems), problems
    assert all(one.startswith(f"{disk.directory}/kata.toml:") for one in problems), problems


@pytest.mark.parametrize(("agent", "runtime", "problem"), [
    ("dial_timeout_ms = 0", "", "dial_timeout_ms is 0, must be 1 to"),
    ("dial_timeout_ms = 100\nreconnect_timeout_ms = 99", "",
     "reconnect_timeout_ms is 99, less than dial_timeout_ms"),
    ("", "disable_new_netns = true", 'disable_new_netns works with internetworking_model = "none" only'),
    ("", 'sandbox_bind_mounts = ["a"]', "sandbox_bind_mounts has a, must be an absolute path"),
    ("", 'sandbox_bind_mounts = ["/a/x:ro", "/b/x:rw"]', "has two entries that end in x"),
    ("", 'shared_mounts = [{name = "n", src_ctr = "a", src_path = "/s", dst_ctr = "b"}]',
     "shared_mounts n needs dst_path"),
    ("", 'shared_mounts = [{name = "n", src_ctr = "a", src_path = "/s/../t", dst_ctr = "b", dst_path = "/"}]',
     "/s/../t must be an absolute path"),
    ("", 'shared_mounts = [{name = "n", src_ctr = "a", src_path = "/s|t", dst_ctr = "b", dst_path = "/d"}]',
     "/s|t must be an absolute path"),
])
def test_agent_and_runtime_rules(disk, agent, runtime, problem):
    problems = problems_of(disk, agent=agent, runtime=runtime)
    assert any(problem in one for one in problems), problems


@pytest.mark.parametrize("hypervisor", [
    f'kernel_verity_params = "{VERITY}"',
    'confidential_guest = true\nshared_fs = "none"',
    "block_device_logical_sector_size = 512\nblock_device_physical_sector_size = 4096",
    'machine_type = "microvm"',
    'boot_initrd = "/b"',
    "pcie_root_port = 2",
    "default_vcpus = 2\ndefault_maxvcpus = 2",
    'guest_extension_images = [{name = "a-1_B", path = "/p", verity_params = ""}]',
])
def test_what_is_allowed(disk, hypervisor):
    disk.toml(hypervisor)


def test_a_guest_is_needed(disk):
    with pytest.raises(InvalidConfig) as caught:
        disk.load("a.toml", "[hypervisor.qemu]\n")
    assert [problem.partition(": ")[2] for problem in caught.value.problems] == [
        "[hypervisor.qemu] needs a kernel", "[hypervisor.qemu] needs an image or an initrd"]
    with pytest.raises(InvalidConfig, match="boot_initrd switches to an image, and image is not set"):
        disk.load("a.toml", "[hypervisor.qemu]\nkernel='/k'\ninitrd='/r'\nboot_initrd='/b'\n")


def test_secure_execution_has_its_image_in_the_kernel(disk):
    disk.load("a.toml", "[hypervisor.qemu]\nkernel='/k'\nmachine_type='s390-ccw-virtio'\n"
                        "confidential_guest=true\n")


@pytest.mark.parametrize(("driver", "settings", "problem"), [
    ("firecracker", "initrd='/r'", "Firecracker boots from an image"),
    ("firecracker", "image='/i'\nshared_fs='virtio-fs'\ndefault_memory=128",
     "Firecracker has no shared filesystem"),
    ("firecracker", "image='/i'\ndefault_memory=100", "the firecracker driver needs 128 or more"),
    ("dragonball", "image='/i'\npath='/p'", "refuses path: Dragonball is no program"),
    ("dragonball", "image='/i'\nfirmware='/p'", "refuses firmware"),
    ("dragonball", "image='/i'\nenable_iothreads=true", "refuses enable_iothreads"),
    ("dragonball", "image='/i'\ndefault_bridges=1", "refuses default_bridges"),
    ("dragonball", "image='/i'\nmachine_type='pc'", "refuses machine_type"),
    ("dragonball", "image='/i'\nblock_device_driver='virtio-scsi'",
     "cannot have block_device_driver = virtio-scsi"),
    ("dragonball", "image='/i'\nshared_fs='virtio-fs-nydus'", "cannot have shared_fs = virtio-fs-nydus"),
    ("clh", "image='/i'\njailer_path='/j'", "Cloud Hypervisor has no jailer"),
    ("remote", "image='/i'", "the image is the cloud's"),
])
def test_what_drivers_refuse(disk, driver, settings, problem):
    kernel = "" if driver == "remote" else "kernel='/k'\n"
    with pytest.raises(InvalidConfig) as caught:
        disk.load("a.toml", f"[hypervisor.{driver}]\n{kernel}{settings}\n")
    assert any(problem in one for one in caught.value.problems), caught.value.problems


def test_settings_not_implemented_are_one_warning(disk):
    config = disk.toml('enable_numa = true\nuse_legacy_serial = true\nhot_plug_vfio = "no-port"')
    warning, = config.warnings
    assert warning == ("katashim does not implement these settings yet, they have no effect: "
                       f"enable_numa ({config.path}:4), use_legacy_serial ({config.path}:5)")


def test_settings_of_other_drivers_are_one_warning(disk):
    config = disk.load("a.toml", "[hypervisor.clh]\nkernel='/k'\nimage='/i'\naccel='kvm'\npflashes=['/x']\n")
    warning, = config.warnings
    assert warning == ("the clh driver has no use for these settings: "
                       f"accel ({config.path}:4), pflashes ({config.path}:5)")


def test_missing_files(disk):
    kernel = disk.write("k", "")
    config = disk.load("a.toml", f"[hypervisor.qemu]\npath='/no/qemu'\nkernel='{kernel}'\nimage='/no/image'\n"
                                 "[runtime]\nsandbox_bind_mounts=['/no/mount:ro']\n")
    assert missing_files(config) == [
        f"{config.path}:2: hypervisor.path names /no/qemu, which does not exist",
        f"{config.path}:4: hypervisor.image names /no/image, which does not exist",
        f"{config.path}:6: sandbox_bind_mounts names /no/mount, which does not exist"]


def test_missing_files_of_our_guest_name_the_cure(disk):
    config = disk.load("a.conf", "[hypervisor]\n[[qemu]]\nkernel = /var/lib/katashim/guest/no-such-kernel\n")
    text, = (text for text in missing_files(config) if "no-such-kernel" in text)
    assert text.endswith("which does not exist; `katashim-ctl guest build` makes it")
