"""Devices by the addresses that hosts have for them, on a sysfs made by the test."""

import os
from types import SimpleNamespace

import pytest

from katashim.guest.agent import devices
from katashim.guest.agent.rpcerror import RpcError


@pytest.fixture
def bridge(tmp_path, monkeypatch):
    """The directory of a PCI bridge in slot 2 whose bus is 01, with a virtio disk in its slot 5."""
    root = tmp_path / "pci0000:00"
    made = root / "0000:00:02.0"
    (made / "pci_bus" / "0000:01").mkdir(parents=True)
    (made / "0000:01:05.0" / "virtio3" / "block" / "vdc").mkdir(parents=True)
    monkeypatch.setattr(devices, "_SYSFS_PCI", str(root))
    return made


def test_a_pci_path_leads_over_bridges(bridge):
    assert devices.pci_directory("02") == str(bridge)
    assert devices.pci_directory("02/05") == str(bridge / "0000:01:05.0")
    assert devices.pci_directory("2.0/5.0") == str(bridge / "0000:01:05.0")


@pytest.mark.parametrize("path", ["03", "02/06", "02/05.1", "04/05"])
def test_what_is_not_there_yet_is_none(bridge, path):
    assert devices.pci_directory(path) is None


@pytest.mark.parametrize("path", ["", "x", "02//05", "../..", "02/5.9", "02/5.x", "123", "-1"])
def test_what_is_no_pci_path_is_refused(bridge, path):
    with pytest.raises(RpcError, match="is no PCI path"):
        devices.pci_directory(path)


def test_the_disk_at_a_path(bridge):
    assert devices._virtio_child("02/05", "block") == "vdc"
    assert devices._virtio_child("02/05", "net") is None
    assert devices._virtio_child("02/09", "block") is None


def spec():
    return {"linux": {
        "devices": [{"path": "/dev/data", "type": "b", "major": 8, "minor": 16},
                    {"path": "/dev/other", "type": "c", "major": 1, "minor": 9}],
        "resources": {"devices": [{"allow": True, "type": "b", "major": 8, "minor": 16, "access": "rw"},
                                  {"allow": False, "type": "a", "access": "rwm"}]}}}


def request(**fields):
    return SimpleNamespace(**{"id": "", "type": "blk", "vm_path": "/dev/vdb", "container_path": "/dev/data",
                              **fields})


@pytest.fixture
def null_as_disk(monkeypatch):
    monkeypatch.setattr(devices, "locate", lambda driver, address, timeout_s: "/dev/null")


def test_numbers_in_the_spec_become_the_guests(null_as_disk):
    oci = spec()
    devices.add_to_spec(oci, [request()], 1)
    null = os.stat("/dev/null").st_rdev
    wanted = {"major": os.major(null), "minor": os.minor(null)}
    assert oci["linux"]["devices"][0] == {"path": "/dev/data", "type": "c", **wanted}
    assert oci["linux"]["devices"][1]["minor"] == 9
    rules = oci["linux"]["resources"]["devices"]
    assert rules[-1] == {"allow": True, "type": "c", "access": "rwm", **wanted}


@pytest.mark.parametrize(("fields", "words"), [
    ({"container_path": "/dev/nope"}, "Missing devices in OCI spec: /dev/nope"),
    ({"container_path": ""}, "invalid device"), ({"vm_path": "", "id": ""}, "invalid device"),
    ({"type": ""}, "invalid device"), ({"type": "vfio-ap"}, "Unknown device type vfio-ap")])
def test_impossible_devices(null_as_disk, fields, words):
    with pytest.raises(RpcError, match=words):
        devices.add_to_spec(spec(), [request(**fields)], 1)
