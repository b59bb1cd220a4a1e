import os
import subprocess

import pytest
from acquired import stack
from disk_vm import DiskVm
from private_mounts import private_mounts
from shares import make_place, needs_daemon, shared

from katashim.errors import FailedPrecondition, InvalidArgument, KatashimError, NotFound, Unsupported
from katashim.resources import mounts, rootfs

GUEST = "/run/kata-containers/shared/containers/passthrough/c1/rootfs"
LAYER = "/run/kata-containers/sandbox/layers/c1/"


def mount(kind, source="/s", *options):
    return {"type": kind, "source": source, "target": "", "options": list(options)}


def entries(*kinds):
    return [rootfs._entry(mount(kind)) for kind in kinds]


# -- which way ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kinds, has_disks, way", [
    ([], True, rootfs.SHARED_DIR), ([], False, rootfs.SHARED_DIR),
    (["overlay"], True, rootfs.MOUNTED), (["bind"], False, rootfs.MOUNTED), (["bind", "tmpfs"], True, rootfs.MOUNTED),
    (["mkdir/overlay"], True, rootfs.MOUNTED),
    (["ext4"], True, rootfs.DISK), (["xfs"], True, rootfs.DISK), (["erofs"], True, rootfs.DISK),
    (["ext4"], False, rootfs.MOUNTED),
    (["erofs", "overlay"], True, rootfs.LAYERS), (["ext4", "erofs", "erofs", "format/mkdir/overlay"], True, rootfs.LAYERS),
    (["erofs", "format/bind"], True, rootfs.LAYERS),
])
def test_selection(kinds, has_disks, way):
    assert rootfs.choose(entries(*kinds), has_disks) == way


@pytest.mark.parametrize("kinds, has_disks, error, message", [
    (["erofs", "overlay"], False, Unsupported, "cannot have disks"),
    (["erofs", "erofs"], True, InvalidArgument, "not erofs, erofs"),
    (["overlay", "erofs", "overlay"], True, InvalidArgument, "disk images first and one overlay"),
    (["ext4", "overlay", "ext4"], True, InvalidArgument, "disk images first"),
])
def test_lists_that_make_no_root_filesystem(kinds, has_disks, error, message):
    with pytest.raises(error, match=message):
        rootfs.choose(entries(*kinds), has_disks)


def test_a_loop_image_without_disks_is_refused():
    with pytest.raises(Unsupported, match="cannot have disks"):
        rootfs.choose([rootfs._entry(mount("ext4", "/img", "loop"))], False)


@pytest.mark.parametrize("kind, message", [
    ("mkfs/ext4", "containerd must do 'mkfs' itself"), ("fuse.nydus-overlayfs", "fuse.nydus-overlayfs is not supported")])
def test_kinds_of_mount_that_are_refused(kind, message):
    with pytest.raises(Unsupported, match=message):
        rootfs._entry(mount(kind))


# -- disks --------------------------------------------------------------------------------------------
def prepare(mounts_list, tmp_path, *, share=None, vm=None, undo=None, **more):
    return rootfs.prepare("c1", mounts_list, str(tmp_path), {"path": "rootfs"}, sharefs=share, vm=vm or DiskVm(),
                          undo=stack() if undo is None else undo, **more)


def image(tmp_path, name, kind="ext4"):
    """A real filesystem image."""
    path = tmp_path / name
    if kind == "erofs":
        (tmp_path / f"{name}.d").mkdir()
        (tmp_path / f"{name}.d/file").write_text(name)
        subprocess.run(["mkfs.erofs", path, tmp_path / f"{name}.d"], check=True, capture_output=True)
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 20)
        subprocess.run(["mkfs.ext4", "-q", path], check=True, capture_output=True)
    return str(path)


@pytest.mark.parametrize("kind, options, readonly, expected", [
    ("ext4", ["rw", "loop"], False, ("rw",)),
    ("ext4", ["ro", "loop", "noload"], True, ("noload", "ro")),
    ("xfs", ["rw"], False, ("rw", "nouuid")),
    ("erofs", ["loop"], True, ("ro",)),
])
def test_one_image_becomes_one_disk(tmp_path, kind, options, readonly, expected):
    path, vm, undo = image(tmp_path, "img"), DiskVm(), stack()
    found = prepare([mount(kind, path, *options)], tmp_path, vm=vm, undo=undo)
    disk, = vm.seen
    assert (disk.path, disk.readonly) == (path, readonly)
    storage, = found.storages
    assert found.guest_path == GUEST
    assert storage[:5] == ("blk", "02/01", kind, expected, GUEST)
    assert undo.unwind() == [] and vm.disks == {}


def test_a_disk_that_cannot_be_written_is_read_only(tmp_path, monkeypatch):
    path, vm = image(tmp_path, "img"), DiskVm()
    monkeypatch.setattr(os, "access", lambda *args: False)      # root may write to every file
    found = prepare([mount("ext4", path, "rw", "loop")], tmp_path, vm=vm)
    assert vm.seen[0].readonly and found.storages[0].options == ("ro",)


def test_images_that_are_missing_or_no_files(tmp_path):
    with pytest.raises(NotFound, match="cannot use .*/gone as a disk: No such file"):
        prepare([mount("ext4", str(tmp_path / "gone"), "rw")], tmp_path)
    with pytest.raises(InvalidArgument, match="neither a block device nor a file"):
        prepare([mount("ext4", str(tmp_path), "rw")], tmp_path)


def test_disks_of_two_containers_have_ids_of_their_own(tmp_path):
    path, vm = image(tmp_path, "img"), DiskVm()
    for _ in range(3):
        prepare([mount("ext4", path, "ro", "loop")], tmp_path, vm=vm)
    assert len(vm.disks) == 3


# -- layers -------------------------------------------------------------------------------------------
def test_containerds_erofs_snapshotter(tmp_path):
    """The list of containerd 2.x for an image of two layers and a writable image of its own."""
    upper = image(tmp_path, "rwlayer.img")
    layers = [image(tmp_path, name, "erofs") for name in ("1.erofs", "2.erofs")]
    vm, undo = DiskVm(), stack()
    found = prepare([
        mount("ext4", upper, "rw", "loop"), mount("erofs", layers[0], "ro", "loop"),
        mount("erofs", layers[1], "ro", "loop"),
        mount("format/mkdir/overlay", "overlay", "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
              "X-containerd.mkdir.path={{ mount 0 }}/work:0755", "workdir={{ mount 0 }}/work",
              "upperdir={{ mount 0 }}/upper", "lowerdir={{ overlay 1 2 }}", "index=off")], tmp_path, vm=vm, undo=undo)
    assert [(disk.path, disk.readonly) for disk in vm.seen] == [
        (upper, False), (layers[0], True), (layers[1], True)]
    assert [storage[:5] for storage in found.storages] == [
        ("blk", "02/01", "ext4", ("rw",), LAYER + "0"), ("blk", "02/02", "erofs", ("ro",), LAYER + "1"),
        ("blk", "02/03", "erofs", ("ro",), LAYER + "2"),
        ("overlayfs", "overlay", "overlay",
         (f"workdir={LAYER}0/work", f"upperdir={LAYER}0/upper", f"lowerdir={LAYER}1:{LAYER}2", "index=off"), GUEST)]
    made = "io.katacontainers.volume.overlayfs.create_directory=" + LAYER
    assert found.storages[-1].driver_options == (made + "0/upper", made + "0/work")
    assert found.guest_path == GUEST
    assert undo.unwind() == [] and vm.disks == {}


PLACES = [LAYER + "0", LAYER + "1", LAYER + "2"]


@pytest.mark.parametrize("options, kept, made", [
    (["lowerdir={{ mount 0 }}"], (f"lowerdir={LAYER}0", "io.katacontainers.fs-opt.overlay-rw"), ()),
    (["lowerdir={{ overlay 0 1 }}", "ro"], (f"lowerdir={LAYER}0:{LAYER}1", "ro"), ()),
    (["lowerdir={{overlay 2 0}}", "ro"], (f"lowerdir={LAYER}2:{LAYER}1:{LAYER}0", "ro"), ()),
    (["lowerdir={{ mount 1 }}", "upperdir={{ mount 0 }}/u", "workdir={{ mount 0 }}/w"],
     (f"lowerdir={LAYER}1", f"upperdir={LAYER}0/u", f"workdir={LAYER}0/w"), (LAYER + "0/u", LAYER + "0/w")),
    (["lowerdir={{ mount 1 }}/part", "ro", "loop", "X-other=1"], (f"lowerdir={LAYER}1/part", "ro"), ()),
])
def test_overlay_options(options, kept, made):
    storage = rootfs.overlay_storage(options, PLACES, GUEST)
    assert storage.options == kept
    assert storage.driver_options == tuple(
        "io.katacontainers.volume.overlayfs.create_directory=" + path for path in made)


@pytest.mark.parametrize("options, message", [
    (["ro"], "no lowerdir"), (["lowerdir={{ mount 3 }}"], "only 3 stand before it"),
    (["lowerdir={{ overlay 0 7 }}"], "names mount 7"), (["lowerdir=/host/dir"], "/host/dir is a directory of the host"),
    (["lowerdir={{ mount 0 }}:/host"], "/host is a directory"), (["lowerdir={{ source 0 }}"], "template that katashim"),
    (["lowerdir={{ mount 0 }}x"], "is a directory of the host"),
])
def test_overlay_options_that_cannot_be(options, message):
    with pytest.raises(InvalidArgument, match=message):
        rootfs.overlay_storage(options, PLACES, GUEST)


def test_a_view_of_one_layer_needs_no_overlay(tmp_path):
    path, vm = image(tmp_path, "1.erofs", "erofs"), DiskVm()
    found = prepare([mount("erofs", path, "loop"), mount("format/bind", "{{ mount 0 }}", "ro", "rbind")], tmp_path, vm=vm)
    assert [storage[:5] for storage in found.storages] == [("blk", "02/01", "erofs", ("ro",), GUEST)]
    with pytest.raises(Unsupported, match="/upper"):
        prepare([mount("ext4", path, "loop"), mount("format/mkdir/bind", "{{ mount 0 }}/upper", "rbind")], tmp_path)


def test_a_filesystem_of_several_devices_names_the_cure(tmp_path):
    path = image(tmp_path, "1.erofs", "erofs")
    with pytest.raises(Unsupported, match="max_unmerged_layers to 0"):
        prepare([mount("erofs", path, "ro", "loop", "device=/other")], tmp_path)


def test_a_disk_that_cannot_be_plugged_leaves_none_behind(tmp_path):
    paths = [image(tmp_path, name, "erofs") for name in ("1.erofs", "2.erofs")]
    vm, undo = DiskVm(), stack()
    add = vm.add_device

    def no_slot(device):
        if len(vm.seen) == 1:
            raise KatashimError("no free slot")
        return add(device)

    vm.add_device = no_slot
    with pytest.raises(KatashimError, match="no free slot"), undo.scope():
        prepare([*(mount("erofs", path, "loop") for path in paths),
                 mount("format/overlay", "overlay", "lowerdir={{ overlay 0 1 }}")], tmp_path, vm=vm, undo=undo)
    assert vm.disks == {} and len(undo) == 0


# -- directories --------------------------------------------------------------------------------------
def test_without_a_share_a_directory_names_the_cure(tmp_path):
    for mounts_list in ([], [mount("overlay", "overlay", "lowerdir=/a")]):
        with pytest.raises(Unsupported, match="set shared_fs = virtio-fs, or use a snapshotter with disk images"):
            prepare(mounts_list, tmp_path)


@pytest.fixture
def share_place(tmp_path, monkeypatch):
    make_place(tmp_path, monkeypatch)
    (tmp_path / "bundle/rootfs").mkdir(parents=True)
    return tmp_path


def exported(place):
    return place / "shared/s1/ro/passthrough/c1/rootfs"


@needs_daemon
@private_mounts
def test_the_bundles_own_directory_is_shared(share_place):
    (share_place / "bundle/rootfs/hello").write_text("x")
    with shared() as share:
        undo = stack()
        found = prepare([], share_place / "bundle", share=share, undo=undo)
        assert found == (GUEST, ()) and os.listdir(exported(share_place)) == ["hello"]
        (exported(share_place) / "new").write_text("written")
        assert undo.unwind() == []
        assert not exported(share_place).parent.exists()
    assert (share_place / "bundle/rootfs/new").exists()
    with shared() as share, pytest.raises(NotFound, match="rootfs is not a directory"):
        rootfs.prepare("c1", [], str(share_place / "bundle"), {"path": "/no/rootfs"}, sharefs=share, vm=DiskVm(),
                       undo=stack())


@needs_daemon
@private_mounts
def test_an_overlay_is_mounted_at_the_bundle_and_shared(share_place):
    for name in ("lower", "upper", "work"):
        (share_place / name).mkdir()
    (share_place / "lower/hello").write_text("x")
    os.rmdir(share_place / "bundle/rootfs")
    overlay = mount("overlay", "overlay", "index=off", f"lowerdir={share_place}/lower", f"upperdir={share_place}/upper",
                    f"workdir={share_place}/work")
    with shared() as share:
        undo = stack()
        prepare([overlay], share_place / "bundle", share=share, undo=undo)
        (exported(share_place) / "new").write_text("written")
        assert (share_place / "upper/new").read_text() == "written"
        with pytest.raises(FailedPrecondition, match="bundle/rootfs is a mount point already"):
            prepare([overlay], share_place / "bundle", share=share)
        assert undo.unwind() == []
        assert mounts.at_or_below(str(share_place / "bundle")) == []
        assert os.listdir(share_place / "bundle") == []
    assert (share_place / "lower/hello").exists() and (share_place / "upper/new").exists()


@needs_daemon
@private_mounts
def test_a_read_only_snapshot_stays_read_only(share_place):
    (share_place / "snapshot").mkdir()
    with shared() as share:
        undo = stack()
        prepare([mount("bind", str(share_place / "snapshot"), "rbind", "ro")], share_place / "bundle", share=share,
                undo=undo)
        for path in (exported(share_place), share_place / "bundle/rootfs"):
            with pytest.raises(OSError, match="Read-only"):
                (path / "new").write_text("x")
        assert undo.unwind() == []
        with pytest.raises(NotFound, match="/gone does not exist"):
            prepare([mount("bind", "/gone", "rbind")], share_place / "bundle", share=share, undo=undo)
        assert undo.unwind() == []


@needs_daemon
@private_mounts
def test_a_guest_with_a_share_gets_the_mount_point_of_its_disk_from_the_host(share_place):
    path = image(share_place, "img")
    with shared() as share:
        undo = stack()
        prepare([mount("ext4", path, "loop")], share_place / "bundle", share=share, undo=undo)
        assert exported(share_place).is_dir()
        assert undo.unwind() == [] and not exported(share_place).parent.exists()


@private_mounts
def test_containerds_mkdir_directives(tmp_path):
    undo = stack()
    rootfs.mount_all([rootfs._entry(mount("mkdir/tmpfs", "tmpfs", f"X-containerd.mkdir.path={tmp_path}/a/b:0750:5:6",
                                          f"X-containerd.mkdir.path={tmp_path}/c"))], str(tmp_path / "target"), undo)
    info = os.stat(tmp_path / "a/b")
    assert (info.st_mode & 0o777, info.st_uid, info.st_gid) == (0o750, 5, 6)
    assert os.stat(tmp_path / "c").st_mode & 0o777 == 0o700
    assert undo.unwind() == [] and not (tmp_path / "target").exists()
    with pytest.raises(InvalidArgument, match="not PATH"):
        rootfs._make_directory(f"{tmp_path}/d:rwx")
    with pytest.raises(Unsupported, match="refer to each other"):
        rootfs.mount_all([rootfs._entry(mount("format/bind", "{{ mount 0 }}"))], str(tmp_path / "target"), undo)
