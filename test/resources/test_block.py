import os
import subprocess

import pytest
from acquired import stack
from disk_vm import DiskVm

from katashim.errors import NotFound, Unsupported
from katashim.resources import block


def sized(path, size=1 << 20):
    with open(path, "wb") as file:
        file.truncate(size)
    return str(path)


def some_block_device():
    """A block device of this machine and its numbers, or None."""
    for name in sorted(os.listdir("/sys/block")):
        path = "/dev/" + name
        if block.is_block_device(path):
            number = os.stat(path).st_rdev
            return path, os.major(number), os.minor(number)
    return None


DEVICE = some_block_device()
needs_device = pytest.mark.skipif(DEVICE is None, reason="this machine has no block device")


@pytest.mark.parametrize("command, name", [
    (["mkfs.ext4", "-q"], "ext4"), (["mkfs.ext3", "-q"], "ext4"), (["mkfs.ext2", "-q"], "ext4"), (None, "")])
def test_filesystems_are_known_by_their_magic(tmp_path, command, name):
    path = sized(tmp_path / "image")
    if command:
        subprocess.run([*command, path], check=True, capture_output=True)
    assert block.filesystem_of(path) == name


def test_read_only_filesystems_and_odd_files(tmp_path):
    (tmp_path / "d").mkdir()
    subprocess.run(["mkfs.erofs", tmp_path / "image", tmp_path / "d"], check=True, capture_output=True)
    assert block.filesystem_of(str(tmp_path / "image")) == "erofs"
    (tmp_path / "xfs").write_bytes(b"XFSB" + bytes(508))
    assert block.filesystem_of(str(tmp_path / "xfs")) == "xfs"
    (tmp_path / "empty").write_bytes(b"")
    assert block.filesystem_of(str(tmp_path / "empty")) == ""


def test_guest_options():
    assert block.guest_options(["rbind", "loop", "noatime", "X-containerd.x=1", "defaults", "ro"]) == ["noatime", "ro"]


def test_attach_and_release(tmp_path):
    vm, undo = DiskVm(), stack()
    disk = block.attach(vm, sized(tmp_path / "a"), False, undo)
    assert disk == vm.disks[disk.id] and not disk.readonly
    assert set(disk.id) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert undo.unwind() == [] and vm.disks == {}


def test_a_vm_without_disks_says_so(tmp_path):
    undo = stack()
    with pytest.raises(Unsupported, match="disks-only driver"):
        block.attach(DiskVm(()), sized(tmp_path / "a"), True, undo)
    assert undo.unwind() == []


@needs_device
def test_the_spec_s_block_devices_become_disks():
    path, major, minor = DEVICE
    rules = [{"allow": False, "access": "rwm"}, {"allow": True, "major": major, "minor": minor, "access": "rm"}]
    spec = {"linux": {"devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
                                  {"path": "/dev/xvda", "type": "b", "major": major, "minor": minor}],
                      "resources": {"devices": rules}}}
    vm, undo = DiskVm(), stack()
    device, = block.devices(spec, vm, undo)
    assert (device.id, device.type, device.vm_path, device.container_path) == ("02/01", "blk", "", "/dev/xvda")
    assert vm.seen[0].path == path and vm.seen[0].readonly
    rules[1]["access"] = "rwm"
    block.devices(spec, vm, undo)
    assert vm.seen[1].readonly == block.is_readonly(path)
    assert undo.unwind() == [] and vm.disks == {}


def test_devices_without_blocks_or_without_a_host_device():
    assert block.devices({"linux": {}}, DiskVm(), stack()) == ()
    spec = {"linux": {"devices": [{"path": "/dev/x", "type": "b", "major": 4000, "minor": 1}]}}
    with pytest.raises(NotFound, match=r"no block device 4000:1 \(for /dev/x\)"):
        block.devices(spec, DiskVm(), stack())


def test_a_disk_named_by_its_node_in_the_guest():
    class MmioVm(DiskVm):
        def add_device(self, device):
            return super().add_device(device)._replace(agent_type="mmioblk", guest_address="/dev/vdb")

    if DEVICE is None:
        pytest.skip("this machine has no block device")
    spec = {"linux": {"devices": [{"path": "/dev/x", "type": "b", "major": DEVICE[1], "minor": DEVICE[2]}]}}
    device, = block.devices(spec, MmioVm(), stack())
    assert (device.id, device.vm_path) == ("", "/dev/vdb")
