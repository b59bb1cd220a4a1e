"""Records that the host hands to the guest's agent: the Kata protocol's nouns as plain tuples.

Field names are the agent's own (proto spelling), so ``katashim.ttrpc.proto.build`` can turn a
record into its message without a table. Resources make them, the agent client sends them.
"""

from typing import NamedTuple


class FSGroup(NamedTuple):
    group_id: int
    group_change_policy: int = 0        # 0 Always, 1 OnRootMismatch


class Storage(NamedTuple):
    """Something for the agent to mount before a container starts (grpc.Storage)."""

    driver: str                         # "virtio-fs", "blk", "ephemeral", "local", "overlayfs", ...
    source: str
    fstype: str
    options: tuple = ()
    mount_point: str = ""
    driver_options: tuple = ()
    fs_group: FSGroup = None
    shared: bool = False


class Device(NamedTuple):
    """A device the container wants at `container_path` (grpc.Device)."""

    id: str                             # guest address: PCI path, SCSI address, ...
    type: str                           # "blk", "scsi", "mmioblk", "vfio-pci", ...
    vm_path: str = ""
    container_path: str = ""
    options: tuple = ()


class IPAddress(NamedTuple):
    family: int                         # 0 IPv4, 1 IPv6
    address: str
    mask: str                           # prefix length in decimal


class Interface(NamedTuple):
    device: str
    name: str
    IPAddresses: tuple = ()
    mtu: int = 1500
    hwAddr: str = ""
    devicePath: str = ""                # guest PCI path, "" = find it by hwAddr
    type: str = ""
    raw_flags: int = 0                  # IFF_NOARP or 0


class Route(NamedTuple):
    dest: str = ""                      # CIDR, "" = default
    gateway: str = ""
    device: str = ""
    source: str = ""
    scope: int = 0
    family: int = 0
    flags: int = 0
    mtu: int = 0


class ARPNeighbor(NamedTuple):
    toIPAddress: IPAddress
    device: str
    lladdr: str
    state: int = 0x80                   # NUD_PERMANENT
    flags: int = 0


class GuestNetwork(NamedTuple):
    """All that the agent must set up before CreateSandbox."""

    interfaces: tuple = ()
    routes: tuple = ()
    neighbors: tuple = ()
