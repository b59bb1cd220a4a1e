"""Places and addresses of QEMU's devices."""

import pytest

from katashim.drivers import base, qemu_devices
from katashim.drivers.qemu_devices import ROOT_BUS, Slots, vd_name
from katashim.errors import ConfigError, InvalidArgument, NotFound, ResourceExhausted


@pytest.mark.parametrize(("index", "name"), [(0, "vda"), (25, "vdz"), (26, "vdaa"), (701, "vdzz"), (702, "vdaaa")])
def test_names_of_virtio_disks(index, name):
    assert vd_name(index) == name


def test_devices_at_boot_sit_on_the_root_bus_in_order_after_the_bridges():
    slots = Slots(pci=True, bridges=2)
    assert slots.bridges == [("pci-bridge-0", 1), ("pci-bridge-1", 2)]
    assert [slots.at_boot() for _ in range(2)] == [{"bus": ROOT_BUS, "addr": "0x3"}, {"bus": ROOT_BUS, "addr": "0x4"}]
    assert slots.pci_path({"bus": ROOT_BUS, "addr": "0x1e"}) == "1e"


def test_plugged_devices_sit_behind_the_bridges():
    slots = Slots(pci=True, bridges=2)
    places = [slots.hotplug() for _ in range(60)]
    assert slots.pci_path(places[0]) == "01/01"
    assert slots.pci_path(places[29]) == "01/1e"
    assert slots.pci_path(places[30]) == "02/01"
    assert len({slots.pci_path(place) for place in places}) == 60
    with pytest.raises(ResourceExhausted, match="default_bridges"):
        slots.hotplug()
    slots.release(places[7])
    assert slots.hotplug() == places[7]


def test_the_root_bus_is_finite():
    slots = Slots(pci=True)
    for _ in range(30):
        slots.at_boot()
    with pytest.raises(ResourceExhausted, match=r"pcie\.0"):
        slots.at_boot()


def test_mmio_has_no_addresses_and_no_hotplug():
    slots = Slots(pci=False, bridges=1)
    assert slots.bridges == [] and slots.at_boot() == {}
    slots.release({})
    with pytest.raises(ResourceExhausted):
        slots.hotplug()
    for _ in range(23):
        slots.at_boot()
    with pytest.raises(ResourceExhausted, match="24 devices"):
        slots.at_boot()


@pytest.mark.parametrize(("index", "address"), [(0, "0:0"), (255, "0:255"), (256, "1:0")])
def test_scsi_addresses(index, address):
    assert qemu_devices.scsi_address(index) == address
    disk = qemu_devices.scsi_disk("d", "n", base.Disk("d", "/x"), index)
    assert f"{disk['scsi-id']}:{disk['lun']}" == address


def test_block_nodes_are_made_of_files_and_block_devices_only(tmp_path):
    image = tmp_path / "a,b.img"
    image.write_bytes(b"x" * 512)
    assert qemu_devices.block_node("n", str(image), readonly=True)["driver"] == "file"
    with pytest.raises(NotFound, match="No such file"):
        qemu_devices.block_node("n", str(tmp_path / "none"), readonly=True)
    for path in (str(tmp_path), "/dev/null"):
        with pytest.raises(InvalidArgument, match="neither a regular file nor a block device"):
            qemu_devices.block_node("n", path, readonly=True)


def test_a_serial_has_at_most_twenty_characters():
    with pytest.raises(InvalidArgument, match="longer than 20"):
        qemu_devices.check_disk(base.Disk("d", __file__, serial="x" * 21))


@pytest.mark.parametrize("size", [0, 1000, 2048])
def test_virtio_fs_queues_are_powers_of_two(size):
    with pytest.raises(ConfigError, match="virtio_fs_queue_size"):
        qemu_devices.fs_device("c", base.ShareFs("t", "/s", size), True, {})


def test_several_descriptors_are_joined_by_colons():
    """QEMU splits fds= at colons, never at commas (runtime-rs got that wrong)."""
    assert qemu_devices.tap_backend("n", ("a", "b"), (1, 2)) == {
        "type": "tap", "id": "n", "fds": "a:b", "vhost": True, "vhostfds": "1:2"}
    assert "vhost" not in qemu_devices.tap_backend("n", (3,), ())
