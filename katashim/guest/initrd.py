"""The small initial RAM disk: busybox, the modules that reach the root image, and initrd.sh.

A plain cpio archive (format newc, Documentation/driver-api/early-userspace/buffer-format.rst):
under TCG a guest takes longer to unpack a compressed one than to have it loaded. Written without a
cpio program, so that it is the same bytes every time. Called by build.py; plain.
"""

import os
import stat

from katashim.guest import kernel

SCRIPT = os.path.join(os.path.dirname(__file__), "initrd.sh")
_DIRECTORIES = ("bin", "dev", "lib", "lib/modules", "proc", "root", "sys")
_APPLETS = ("sh", "mount", "modprobe", "losetup", "sleep", "cat", "poweroff", "switch_root")


class Archive:
    """A cpio archive in the making. Members belong to root and carry no time."""

    def __init__(self):
        self._parts = []
        self._inode = 0

    def directory(self, name):
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name, data, mode=0o644):
        self._add(name, stat.S_IFREG | mode, data)

    def link(self, name, target):
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name, major, minor):
        """A character device."""
        self._add(name, stat.S_IFCHR | 0o600, b"", major, minor)

    def bytes(self):
        """The archive with its trailer, padded to a multiple of 512."""
        self._add("TRAILER!!!", 0, b"")
        data = b"".join(self._parts)
        return data + bytes(-len(data) % 512)

    def _add(self, name, mode, data, major=0, minor=0):
        self._inode += 1
        fields = (self._inode, mode, 0, 0, 2 if stat.S_ISDIR(mode) else 1, 0, len(data), 0, 0, major, minor,
                  len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]


def make(base_layer, kernel_layer, rootfs=None):
    """The archive as bytes.

    :param base_layer: where busybox comes from. :param kernel_layer: where the modules come from.
    :param rootfs: path of a root image to carry along, for hosts that boot from an initrd alone.
    """
    modules = os.path.join(kernel_layer, "modules")
    archive = Archive()
    for name in _DIRECTORIES:
        archive.directory(name)
    archive.device("dev/console", 5, 1)
    archive.device("dev/null", 1, 3)
    archive.file("bin/busybox", _read(os.path.join(base_layer, "tree", "bin", "busybox")), 0o755)
    for name in _APPLETS:
        archive.link(f"bin/{name}", "busybox")
    with open(os.path.join(kernel_layer, "release")) as file:
        base = f"lib/modules/{file.read()}"
    archive.directory(base)
    order = kernel.in_order(kernel.BOOT_MODULES + kernel.RARE_BOOT_MODULES, modules)
    for name in order:
        archive.file(f"{base}/{name}.ko", _read(os.path.join(modules, kernel.file_name(name))))
    archive.file(f"{base}/modules.dep", "".join(_dependency_line(name, modules) for name in order).encode())
    archive.file("modules", (" ".join(name for name in kernel.BOOT_MODULES if name in order) + "\n").encode())
    if rootfs is not None:
        archive.file("rootfs.img", _read(rootfs))
    archive.file("init", _read(SCRIPT), 0o755)
    return archive.bytes()


def _dependency_line(name, modules):
    """A line of modules.dep: the module, a colon, and all it needs, the last to load first."""
    needed = kernel.in_order([name], modules)[-2::-1]
    return f"{name}.ko: {' '.join(f'{other}.ko' for other in needed)}".rstrip() + "\n"


def _read(path):
    with open(path, "rb") as file:
        return file.read()
