"""Finding the guest's devices by the addresses that the host knows, and putting them into container specs.

Addresses are those of the Kata agent's protocol: ``02/05`` (PCI slots from the root bus down, in hex, each
with ``.function`` where it is not 0), ``ID:LUN`` (SCSI), ``/dev/...``. Called by storage.py, network.py,
sandbox.py.
"""

import os
import stat

from katashim.guest.agent import uevents
from katashim.guest.agent.rpcerror import INTERNAL, INVALID_ARGUMENT, RpcError

_SYSFS_PCI = "/sys/devices/pci0000:00"
_ROOT_COMPLEX_FROM = 0x20       # a first slot from here on is the bus number of another root complex


def pci_directory(path):
    """The sysfs directory of a PCI path, or None while a bridge on the way is not there.

    :param path: such as ``02/05``. :raises RpcError: it is none.
    """
    segments = [_slot(part, path) for part in path.split("/")]
    directory, bus = _SYSFS_PCI, "0000:00"
    if len(segments) == 3 and segments[0][0] >= _ROOT_COMPLEX_FROM:
        number = segments.pop(0)[0]
        directory, bus = f"/sys/devices/pci0000:{number:02x}", f"0000:{number:02x}"
    for index, (slot, function) in enumerate(segments):
        if index:
            try:
                bus = os.listdir(f"{directory}/pci_bus")[0]
            except (FileNotFoundError, IndexError):
                return None
        directory = f"{directory}/{bus}:{slot:02x}.{function}"
    return directory if os.path.isdir(directory) else None


def block_by_pci(path, timeout_s):
    """The device node of the virtio disk at a PCI path, when it is there."""
    name = uevents.wait_for(lambda: _virtio_child(path, "block"), timeout_s, f"the disk at PCI path {path}")
    return wait_for_node(f"/dev/{name}", timeout_s)


def network_by_pci(path, timeout_s):
    """The name of the network interface at a PCI path, when it is there."""
    return uevents.wait_for(lambda: _virtio_child(path, "net"), timeout_s,
                            f"the network device at PCI path {path}")


def block_by_scsi(address, timeout_s):
    """The device node of the SCSI disk ``ID:LUN``; its hosts are asked to look for it."""
    target, _, lun = address.partition(":")
    if not (target.isdigit() and lun.isdigit()):
        raise RpcError(INVALID_ARGUMENT, f"{address!r} is no SCSI address (ID:LUN)")
    hosts = "/sys/class/scsi_host"
    for host in os.listdir(hosts) if os.path.isdir(hosts) else ():
        with open(f"{hosts}/{host}/scan", "w") as file:
            file.write(f"0 {target} {lun}")

    def find():
        base = "/sys/bus/scsi/devices"
        for name in os.listdir(base) if os.path.isdir(base) else ():
            if name.endswith(f":0:{target}:{lun}"):
                return _only_entry(f"{base}/{name}/block")
        return None

    return wait_for_node(f"/dev/{uevents.wait_for(find, timeout_s, f'the SCSI disk {address}')}", timeout_s)


def wait_for_node(path, timeout_s):
    """`path` when it is a block device node. :raises RpcError: it is something else, or does not come."""
    def find():
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            return None
        if not stat.S_ISBLK(mode):
            raise RpcError(INVALID_ARGUMENT, f"{path} is not a block device")
        return path

    return uevents.wait_for(find, timeout_s, path)


def locate(driver, address, timeout_s):
    """The block device node of a disk. :param driver: ``blk``, ``mmioblk``, ``scsi`` or ``nvdimm``."""
    if driver == "scsi":
        return block_by_scsi(address, timeout_s)
    if driver == "blk" and not address.startswith("/dev/"):
        return block_by_pci(address, timeout_s)
    return wait_for_node(address, timeout_s)


def add_to_spec(oci, requests, timeout_s):
    """Give each requested device its guest's numbers in the spec, in place.

    :param oci: the runtime spec as a dict. :param requests: list of ``grpc.Device``.
    :raises RpcError: an unknown kind of device, one that does not come, or that the spec does not list.
    """
    if not requests:
        return
    renamed = {}
    for request in requests:
        if not request.type or not (request.id or request.vm_path) or not request.container_path:
            raise RpcError(INTERNAL,
                           f"invalid device {request!r}: type, id or vm_path, and container_path are needed")
        node = _node_of(request, timeout_s)
        entry = next((item for item in oci["linux"]["devices"]
                      if item["path"] == request.container_path), None)
        if entry is None:
            raise RpcError(INTERNAL, f"Missing devices in OCI spec: {request.container_path}")
        facts = os.stat(node)
        major, minor = os.major(facts.st_rdev), os.minor(facts.st_rdev)
        kind = "b" if stat.S_ISBLK(facts.st_mode) else "c"
        renamed[kind, entry["major"], entry["minor"]] = (major, minor)
        entry.update(type=kind, major=major, minor=minor)
    _rename_rules(oci["linux"]["resources"].setdefault("devices", []), renamed)


def _node_of(request, timeout_s):
    if request.type in ("blk", "scsi", "mmioblk", "nvdimm"):
        by_address = request.type in ("blk", "scsi") and request.id
        return locate(request.type, request.id if by_address else request.vm_path, timeout_s)
    if request.type == "vfio-pci-gk":
        return request.vm_path or request.container_path
    raise RpcError(INTERNAL, f"Unknown device type {request.type}")


def _rename_rules(rules, renamed):
    """Device cgroup rules with host numbers get the guest's, and each device is allowed."""
    for rule in rules:
        numbers = renamed.get((rule["type"], rule.get("major"), rule.get("minor")))
        if numbers is not None:
            rule["major"], rule["minor"] = numbers
    for (kind, _, _), (major, minor) in renamed.items():
        rules.append({"allow": True, "type": kind, "major": major, "minor": minor, "access": "rwm"})


def _virtio_child(path, kind):
    """The name below ``virtioN/<kind>/`` of the device at a PCI path, None while it is not there."""
    directory = pci_directory(path)
    if directory is None:
        return None
    for name in os.listdir(directory):
        if name.startswith("virtio"):
            found = _only_entry(f"{directory}/{name}/{kind}")
            if found is not None:
                return found
    return None


def _only_entry(directory):
    try:
        return os.listdir(directory)[0]
    except (FileNotFoundError, IndexError):
        return None


def _slot(part, path):
    slot, _, function = part.partition(".")
    try:
        numbers = int(slot, 16), int(function or "0", 16)
    except ValueError as exc:
        raise RpcError(INVALID_ARGUMENT, f"{path!r} is no PCI path") from exc
    if not 0 <= numbers[0] <= 0xFF or not 0 <= numbers[1] <= 7:
        raise RpcError(INVALID_ARGUMENT, f"{path!r} is no PCI path")
    return numbers
