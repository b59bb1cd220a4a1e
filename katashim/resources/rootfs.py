"""A container's root filesystem, from the mount list of CreateTask to what the agent mounts.

Selection, in this order (:func:`choose` is pure and tested as a table):

* no mounts: the directory that the spec's root.path names is shared;
* disk images and an overlay over them (containerd's EROFS snapshotter, or any list of that shape):
  every image becomes a disk, the guest makes the overlay;
* one block device or image file (blockfile, devmapper): it becomes a disk;
* anything else (overlayfs, native, ...): mounted at <bundle>/rootfs as containerd's own shim does it,
  in the shim's mount namespace, and shared.

Images are never mounted on the host and need no loop device. Layers go to the agent as plain disk
storages and one ``overlayfs`` storage, which Kata's agents have long taken (the newer
``erofs.multi-layer`` says the same in other words).

Called by katashim.runtime.container.
"""

import os
import re
from typing import NamedTuple

from katashim import green
from katashim.agent.types import Storage
from katashim.drivers.base import BLOCK_DEVICE, BLOCK_HOTPLUG
from katashim.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from katashim.resources import block, guest_paths, mounts

IMAGE_FILESYSTEMS = frozenset(("ext2", "ext3", "ext4", "xfs", "erofs", "squashfs", "btrfs"))
_READONLY_FILESYSTEMS = frozenset(("erofs", "squashfs"))

# The agent's words (Kata: overlayfs storage handler).
_UPPER_IN_GUEST_MEMORY = "io.katacontainers.fs-opt.overlay-rw"
_MAKE_DIRECTORY = "io.katacontainers.volume.overlayfs.create_directory="

# containerd's words (docs/mounts.md).
_MKDIR = "X-containerd.mkdir.path="
_TEMPLATE = re.compile(r"\{\{\s*(mount|overlay)\s+(\d+)(?:\s+(\d+))?\s*\}\}")
_TRANSFORMS = ("format", "mkdir")

SHARED_DIR, DISK, LAYERS, MOUNTED = "shared directory", "disk", "layers", "mounted"


class Rootfs(NamedTuple):
    """Where the root filesystem is in the guest, and what the agent mounts to put it there."""

    guest_path: str
    storages: tuple = ()


class Entry(NamedTuple):
    """One mount of the list, without containerd's transforms in its type."""

    type: str
    source: str
    options: tuple

    @property
    def is_image(self):
        """Whether it is a filesystem on a disk or in a file, as opposed to a bind, an overlay, a tmpfs."""
        return self.type in IMAGE_FILESYSTEMS

    @property
    def readonly(self):
        return self.type in _READONLY_FILESYSTEMS or "ro" in self.options


def prepare(cid, rootfs_mounts, bundle, spec_root, *, sharefs, vm, undo, use_disks=True):
    """Bring a container's root filesystem within the guest's reach.

    :param rootfs_mounts: CreateTask's mounts as dicts: type, source, options (target is not looked at).
    :param bundle: absolute path. :param spec_root: the spec's ``root``, a dict with "path".
    :param sharefs: katashim.resources.sharefs.ShareFs, or None where the guest shares no filesystem.
    :param vm: katashim.drivers.base.Hypervisor. :param undo: the container's stack.
    :param use_disks: False where block devices are to be shared as directories
        (disable_block_device_use).
    :returns: :class:`Rootfs`.
    :raises NotFound: a directory or image is missing. :raises InvalidArgument: the list makes no sense.
    :raises Unsupported: this VM cannot have such a root filesystem; says what to set.
    """
    entries = [_entry(mount) for mount in rootfs_mounts]
    has_disks = use_disks and bool(vm.capabilities & {BLOCK_DEVICE, BLOCK_HOTPLUG})
    way = choose(entries, has_disks)
    if way == DISK:
        return _disk(cid, entries[0], sharefs, vm, undo)
    if way == LAYERS:
        return _layers(cid, entries, sharefs, vm, undo)
    if sharefs is None:
        raise Unsupported(f"the root filesystem of {cid} is a directory, but the guest shares none with the "
                          "host: set shared_fs = virtio-fs, or use a snapshotter with disk images "
                          "(erofs, blockfile, devmapper)")
    if way == SHARED_DIR:
        source = os.path.join(bundle, spec_root.get("path") or "rootfs")
    else:
        source = os.path.join(bundle, "rootfs")
        mount_all(entries, source, undo)
    if not os.path.isdir(source):
        raise NotFound(f"the root filesystem {source} is not a directory")
    # What is mounted read-only stays so. The spec's root.readonly is the guest's to apply, after it has
    # made the mount points that the image lacks.
    return Rootfs(sharefs.bind(source, f"{cid}/rootfs", False, undo, recursive=True))


def choose(entries, has_disks):
    """Which way the list goes: SHARED_DIR, DISK, LAYERS or MOUNTED.

    :param has_disks: whether the VM can have disks.
    :raises Unsupported: the list holds image files, and the VM can have no disks.
    :raises InvalidArgument: images with nothing that puts them together.
    """
    if not entries:
        return SHARED_DIR
    if not any(entry.is_image for entry in entries):
        return MOUNTED
    if not has_disks:
        if len(entries) == 1 and "loop" not in entries[0].options:
            return MOUNTED
        raise Unsupported("the root filesystem consists of disk images, but this VM cannot have disks: use a "
                          "snapshotter with directories (overlayfs), or another hypervisor")
    if len(entries) == 1:
        return DISK
    if entries[-1].is_image or not all(entry.is_image for entry in entries[:-1]):
        raise InvalidArgument("a root filesystem of several mounts must be disk images first and one overlay "
                              f"or bind over them last, not {', '.join(entry.type for entry in entries)}")
    return LAYERS


def _entry(mount):
    """A mount of the list as an :class:`Entry`, the transforms in its type taken off."""
    *transforms, kind = (mount.get("type") or "").split("/")
    unknown = [word for word in transforms if word not in _TRANSFORMS]
    if unknown:
        raise Unsupported(f"the root filesystem wants {mount['type']}: containerd must do {unknown[0]!r} itself")
    options = tuple(mount.get("options") or ())
    if not kind and {"bind", "rbind"} & set(options):
        kind = "bind"
    if kind.startswith("fuse"):
        raise Unsupported(f"a root filesystem of type {kind} is not supported: use overlayfs, erofs or blockfile")
    return Entry(kind, mount.get("source") or "", options)


# -- disks ------------------------------------------------------------------------------------------
def _disk(cid, entry, sharefs, vm, undo):
    mount_point = _mount_point(cid, sharefs, undo)
    disk = block.attach(vm, entry.source, entry.readonly, undo)
    return Rootfs(mount_point, (block.storage(disk, entry.type, _options(entry), mount_point),))


def _mount_point(cid, sharefs, undo):
    """The guest's directory for a root filesystem that it mounts. In a share, which the guest cannot
    write, the host has to make it."""
    if sharefs is None:
        return guest_paths.rootfs(cid)
    return sharefs.make_dir(f"{cid}/rootfs", undo)


def _options(entry):
    """An image's own mount options. A filesystem that spans several devices is refused."""
    spanning = [word for word in entry.options if word.startswith("device=")]
    if spanning:
        raise Unsupported(f"{entry.source} spans several image files ({spanning[0]}): set the EROFS "
                          "snapshotter's max_unmerged_layers to 0")
    return entry.options


def _layers(cid, entries, sharefs, vm, undo):
    """Every image a disk of its own, and what the last entry says over them."""
    *images, top = entries
    places = [f"{guest_paths.LAYERS}{cid}/{index}" for index in range(len(images))]
    mount_point = _mount_point(cid, sharefs, undo)
    if top.type == "bind":
        return _one_layer(images, top, mount_point, vm, undo)
    if top.type != "overlay":
        raise Unsupported(f"a root filesystem of disk images under {top.type!r} is not supported")
    overlay = overlay_storage(top.options, places, mount_point)
    storages = []
    for image, place in zip(images, places):
        disk = block.attach(vm, image.source, image.readonly, undo)
        storages.append(block.storage(disk, image.type, _options(image), place))
    return Rootfs(mount_point, (*storages, overlay))


def _one_layer(images, top, mount_point, vm, undo):
    """A read-only view of one image: containerd writes it as a bind of the image's mount."""
    found = _TEMPLATE.fullmatch(top.source)
    if not found or found[1] != "mount":
        raise Unsupported(f"a root filesystem that is the part {top.source!r} of a disk image is not supported: "
                          "the image has no layer of its own below it")
    image = images[_index(found[2], images)]
    readonly = image.readonly or top.readonly
    disk = block.attach(vm, image.source, readonly, undo)
    return Rootfs(mount_point, (block.storage(disk, image.type, _options(image), mount_point),))


def overlay_storage(options, places, mount_point):
    """The agent's overlayfs storage for containerd's overlay options.

    :param options: words with templates in them: ``lowerdir={{ overlay 1 3 }}``, ``upperdir={{ mount 0
        }}/upper``, ``X-containerd.mkdir.path=...``. A writable overlay without an upperdir gets one in
        the guest's memory.
    :param places: where in the guest each image of the list is mounted.
    :raises InvalidArgument: a layer is a directory of the host, or there is no lowerdir.
    """
    kept, directories, given = [], [], set()
    for word in options:
        text = _fill_in(word, places)
        key, _, value = text.partition("=")
        if text.startswith(_MKDIR):
            directories.append(text[len(_MKDIR):].split(":")[0])
        elif key in ("lowerdir", "upperdir", "workdir"):
            _check_inside(key, value, places)
            given.add(key)
            kept.append(text)
        elif text in block.guest_options([text]):
            kept.append(text)
    if "lowerdir" not in given:
        raise InvalidArgument("the overlay of the root filesystem has no lowerdir")
    if "upperdir" in given:
        directories += [word.partition("=")[2] for word in kept if word.startswith(("upperdir=", "workdir="))]
    elif "ro" not in kept:
        kept.append(_UPPER_IN_GUEST_MEMORY)
    made = tuple(_MAKE_DIRECTORY + directory for directory in dict.fromkeys(directories))
    return Storage(driver="overlayfs", source="overlay", fstype="overlay", options=tuple(kept),
                   mount_point=mount_point, driver_options=made)


def _fill_in(text, places):
    """containerd's templates with the guest's paths: ``{{ mount N }}``, ``{{ overlay FIRST LAST }}``."""
    def value(found):
        first = _index(found[2], places)
        if found[1] == "mount":
            return places[first]
        last = _index(found[3] or found[2], places)
        step = 1 if first <= last else -1
        return ":".join(places[index] for index in range(first, last + step, step))

    filled = _TEMPLATE.sub(value, text)
    if "{{" in filled:
        raise InvalidArgument(f"the root filesystem's option {text!r} has a template that katashim does not know")
    return filled


def _index(text, sequence):
    if int(text) >= len(sequence):
        raise InvalidArgument(f"the root filesystem names mount {text}, but only {len(sequence)} stand before it")
    return int(text)


def _check_inside(key, value, places):
    for path in value.split(":"):
        if not any(path == place or path.startswith(place + "/") for place in places):
            raise InvalidArgument(f"the root filesystem's {key} {path} is a directory of the host, its other "
                                  "layers are disk images: they cannot be put together")


# -- mounted on the host --------------------------------------------------------------------------------
def mount_all(entries, target, undo):
    """Mount the list at `target`, one over the other, as containerd does.

    :param undo: gets each mount.
    :raises FailedPrecondition: something is mounted at `target` already.
    """
    if any("{{" in word for entry in entries for word in (*entry.options, entry.source)):
        raise Unsupported("the root filesystem's mounts refer to each other, but are not disk images")
    if not os.path.isdir(target):
        undo.push("dir", path=target)
        os.mkdir(target)
    if mounts.is_mount_point(target):
        raise FailedPrecondition(f"{target} is a mount point already")
    for entry in entries:
        undo.push("mount", target=target)
        green.in_thread(_mount_one, entry, target, what=f"mounting {entry.type} {entry.source} on {target}",
                        timeout_s=30)


def _mount_one(entry, target):
    for word in entry.options:
        if word.startswith(_MKDIR):
            _make_directory(word[len(_MKDIR):])
    if entry.type == "bind" and not os.path.exists(entry.source):
        raise NotFound(f"the root filesystem {entry.source} does not exist")
    words = [word for word in entry.options if word != "loop"]
    if entry.type == "bind" and not {"bind", "rbind"} & set(words):
        words.append("bind")
    mounts.mount(entry.source, target, entry.type, words)


def _make_directory(directive):
    """containerd's ``PATH[:MODE[:UID:GID]]``; a directory that exists is left as it is."""
    path, *rest = directive.split(":")
    if os.path.isdir(path):
        return
    try:
        mode = int(rest[0], 8) if rest else 0o700
        owner = [int(word) for word in rest[1:3]]
    except ValueError as exc:
        raise InvalidArgument(f"not PATH[:MODE[:UID:GID]]: {directive!r}") from exc
    os.makedirs(path)
    os.chmod(path, mode)
    if len(owner) == 2:
        os.chown(path, *owner)
