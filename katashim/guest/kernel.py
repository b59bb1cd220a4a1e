"""The guest's kernel: Debian's cloud kernel out of its package, or the small one built from Debian's source.

What comes out is a directory with

    vmlinux         uncompressed ELF with a PVH entry, which QEMU, Firecracker and Cloud Hypervisor boot
                    without running a decompressor (0.4 s of every boot under TCG)
    modules/        the modules the guest may need, flat, uncompressed; none for the kernel from source
    release         ``uname -r`` of it

The bzImage layout is that of Documentation/arch/x86/boot.rst; the payload's last four bytes are its
uncompressed size. Called by build.py; plain.
"""

import glob
import os
import re
import shutil
import struct

from katashim.errors import FailedPrecondition, InvalidArgument
from katashim.guest import commands

SOURCE_RECIPE = 1       # to be raised when from_source does something else with the same source and CONFIG
CONFIG = os.path.join(os.path.dirname(__file__), "kernel.config")

# What reaches the root image, in the initrd: buses, disks, filesystems that a root may have.
BOOT_MODULES = ("virtio_pci", "virtio_mmio", "virtio_blk", "erofs")
RARE_BOOT_MODULES = ("virtio_pmem", "nvme", "loop")

# What the agent loads for devices that it finds, or the kernel asks /sbin/modprobe for.
GUEST_MODULES = (
    # devices
    "vmw_vsock_virtio_transport", "virtio_net", "virtio_console", "virtio-rng", "virtio_balloon",
    "virtio_scsi", "sd_mod", "virtio_mem", "virtiofs", "vfio-pci", "ptp_kvm",
    # filesystems
    "overlay", "squashfs", "xfs", "9p", "9pnet_virtio", "nls_ascii", "vfat", "isofs",
    # device mapper
    "dm-mod", "dm-verity", "dm-crypt",
    # network
    "tun", "veth", "bridge", "macvlan", "ipvlan", "vxlan", "dummy", "8021q", "br_netfilter", "nf_tables",
    "nft_compat", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq", "nft_redir", "nft_reject_inet",
    "nft_fib_inet", "nf_conntrack_netlink", "ip_tables", "iptable_filter", "iptable_nat", "iptable_mangle",
    "ip6_tables", "ip6table_filter", "ip6table_nat", "ip6table_mangle", "ipt_REJECT", "ip6t_REJECT",
    "xt_conntrack", "xt_MASQUERADE", "xt_nat", "xt_tcpudp", "xt_multiport", "xt_comment", "xt_mark",
    "xt_connmark", "xt_addrtype", "xt_statistic", "xt_physdev", "xt_LOG", "xt_REDIRECT", "xt_owner",
    "xt_state", "ip_set", "xt_set", "ip_vs", "sch_ingress", "sch_htb", "sch_fq_codel", "cls_u32",
    "act_mirred", "wireguard",
)

_MAGIC = (
    (b"\x02\x21\x4c\x18", ["lz4", "-d", "-c", "-q"]),
    (b"\x28\xb5\x2f\xfd", ["zstd", "-d", "-c", "-q"]),
    (b"\x1f\x8b", ["gzip", "-d", "-c", "-q"]),
    (b"\xfd7zXZ\x00", ["xz", "-d", "-c", "-q"]),
    (b"BZh", ["bzip2", "-d", "-c", "-q"]),
    (b"\x5d\x00\x00", ["xz", "--format=lzma", "-d", "-c", "-q"]),
)


def require_tools(flavour):
    """Check for the programs that a kernel of that `flavour` is made with.

    :raises FailedPrecondition: names those that are missing, and the command that installs them.
    """
    if flavour == "debian":
        commands.require({"dpkg-deb": "dpkg", "lz4": "lz4", "zstd": "zstd", "xz": "xz-utils"})
        return
    commands.require({"dpkg-deb": "dpkg", "gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison",
                      "bc": "bc",
                      "ld": "binutils", "xz": "xz-utils"})
    if not os.path.exists("/usr/include/libelf.h"):
        raise FailedPrecondition("building the kernel from source needs libelf.h: apt-get install libelf-dev")


def extract(bzimage):
    """The ELF image inside a bzImage.

    :param bzimage: bytes. :returns: bytes.
    :raises InvalidArgument: not a bzImage, compressed in an unknown way, or not ELF inside.
    """
    if bzimage[0x202:0x206] != b"HdrS":
        raise InvalidArgument("this is no x86 bzImage: there is no HdrS at 0x202")
    setup_sectors = bzimage[0x1f1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start:start + length]
    size = struct.unpack("<I", payload[-4:])[0]
    for magic, decompress in _MAGIC:
        if payload.startswith(magic):
            break
    else:
        raise InvalidArgument(f"the kernel is compressed in an unknown way (it begins {payload[:6].hex()})")
    # gzip's own trailer is that size; the others have it appended, which they call garbage.
    body = payload if decompress[0] == "gzip" else payload[:-4]
    vmlinux = commands.run(decompress, what="unpacking the kernel", stdin=body, timeout_s=120)
    if not vmlinux.startswith(b"\x7fELF") or len(vmlinux) != size:
        raise InvalidArgument(f"the kernel unpacks to {len(vmlinux)} bytes, not an ELF image of {size}")
    return vmlinux


def from_package(package, directory):
    """Fill `directory` with the kernel of a Debian ``linux-image`` package file."""
    tree = os.path.join(directory, "unpacked")
    commands.run(["dpkg-deb", "-x", package, tree], what="unpacking the kernel's package")
    (image,) = glob.glob(os.path.join(tree, "boot", "vmlinuz-*"))
    release = os.path.basename(image).partition("-")[2]
    with open(image, "rb") as file:
        _write(directory, "vmlinux", extract(file.read()))
    (base,) = glob.glob(os.path.join(tree, "**", "lib/modules", release), recursive=True) or [None]
    _keep_modules(base, os.path.join(directory, "modules"))
    _write(directory, "release", release.encode())
    shutil.rmtree(tree)


def from_source(source_package, directory, jobs, progress):
    """Build the small kernel from a Debian ``linux-source`` package file; fills `directory`.

    It takes 3 minutes on two idle cores; the compiler runs with lowest priority.
    """
    tree = os.path.join(directory, "unpacked")
    commands.run(["dpkg-deb", "-x", source_package, tree], what="unpacking the kernel's source package")
    (archive,) = glob.glob(os.path.join(tree, "usr/src/linux-source-*.tar.xz"))
    progress("unpacking the kernel's source")
    commands.run(["tar", "-C", tree, "-xf", archive], what="unpacking the kernel's source")
    (source,) = glob.glob(os.path.join(tree, "linux-source-*/"))
    environment = {"KBUILD_BUILD_TIMESTAMP": "1970-01-01", "KBUILD_BUILD_USER": "katashim",
                   "KBUILD_BUILD_HOST": "katashim", "KBUILD_BUILD_VERSION": "1", "SOURCE_DATE_EPOCH": "0"}
    log = os.path.join(directory, "build.log")

    def make(*targets, what, on_line=None):
        commands.run_logged(["nice", "-n", "19", "make", f"-j{jobs}", *targets], log, what=what, cwd=source,
                            env=environment, on_line=on_line)

    progress("configuring the kernel")
    make("tinyconfig", what="configuring the kernel")
    with open(CONFIG) as fragment, open(os.path.join(source, ".config"), "a") as config:
        config.write(fragment.read())
    make("olddefconfig", what="configuring the kernel")
    check_config(os.path.join(source, ".config"))
    make("vmlinux", what="building the kernel", on_line=_object_counter(progress))
    with open(os.path.join(source, "include/config/kernel.release"), "rb") as file:
        _write(directory, "release", file.read().strip())
    shutil.copyfile(os.path.join(source, ".config"), os.path.join(directory, "config"))
    commands.run(["strip", "-o", os.path.join(directory, "vmlinux"), os.path.join(source, "vmlinux")],
                 what="stripping the kernel")
    os.mkdir(os.path.join(directory, "modules"))
    shutil.rmtree(tree)


def check_config(path):
    """Check that Kconfig took every option of our fragment: it drops what lacks a dependency in silence.

    :raises InvalidArgument: names the options that are not in the configuration `path`.
    """
    with open(path) as file:
        taken = set(file.read().split("\n"))
    with open(CONFIG) as file:
        wanted = [line.strip() for line in file if line.startswith("CONFIG_")]
    lost = [line for line in wanted if line not in taken and not _is_off(line, taken)]
    if lost:
        raise InvalidArgument(f"Kconfig dropped {', '.join(lost)} of {CONFIG}: a dependency is missing there")


def _is_off(line, taken):
    name, _, value = line.partition("=")
    return value == "n" and not any(known.startswith(f"{name}=") for known in taken)


def dependencies(module):
    """The names of the modules that the module file `module` needs loaded before it."""
    with open(module, "rb") as file:
        found = re.search(rb"\0depends=([^\0]*)\0", file.read())
    return [name for name in found[1].decode().split(",") if name] if found else []


def in_order(names, modules):
    """All of `names` and what they need, each after its needs.

    :param modules: a directory with module files. Names that are not there are built in, or do not exist.
    """
    ordered = []

    def visit(name):
        path = os.path.join(modules, file_name(name))
        if name in ordered or not os.path.exists(path):
            return
        for needed in dependencies(path):
            visit(_canonical(needed))
        ordered.append(name)

    for name in names:
        visit(_canonical(name))
    return ordered


def virtio_drivers(modules):
    """``(virtio device id, module files in loading order)`` of each driver in the directory `modules`,
    from the aliases that the modules carry (``virtio:d00000013v*``)."""
    for path in sorted(glob.glob(os.path.join(modules, "*.ko"))):
        with open(path, "rb") as file:
            device_ids = re.findall(rb"\0alias=virtio:d([0-9A-F]{8})v\*\0", file.read())
        for device_id in device_ids:
            name = os.path.basename(path).removesuffix(".ko")
            yield int(device_id, 16), [file_name(each) for each in in_order([name], modules)]


def file_name(name):
    """The file of a module: always with underscores, as the kernel itself reports it."""
    return f"{_canonical(name)}.ko"


def _canonical(name):
    return name.replace("-", "_")


def _keep_modules(base, target):
    """Copy the modules of our lists, and what they need, from Debian's tree to the flat `target`."""
    os.mkdir(target)
    if base is None:
        return
    where = {_canonical(os.path.basename(path).partition(".ko")[0]): path
             for path in glob.glob(os.path.join(base, "kernel", "**", "*.ko*"), recursive=True)}
    waiting = [_canonical(name) for name in BOOT_MODULES + RARE_BOOT_MODULES + GUEST_MODULES]
    while waiting:
        name = waiting.pop()
        path = os.path.join(target, file_name(name))
        if name not in where or os.path.exists(path):
            continue
        _copy_module(where[name], path)
        waiting.extend(_canonical(needed) for needed in dependencies(path))


def _copy_module(source, target):
    if source.endswith(".xz"):
        import lzma
        with lzma.open(source) as packed, open(target, "wb") as file:
            shutil.copyfileobj(packed, file)
    else:
        shutil.copyfile(source, target)


def _object_counter(progress):
    built = 0

    def on_line(line):
        nonlocal built
        built += line.lstrip().startswith(("CC ", "AR ", "LD "))
        if built % 200 == 1:
            progress(f"building the kernel ({built} objects)")
    return on_line


def _write(directory, name, data):
    with open(os.path.join(directory, name), "wb") as file:
        file.write(data)
