import os
import socket

import pytest
from acquired import stack
from disk_vm import DiskVm
from guest_files import GuestFiles, served
from private_mounts import private_mounts
from shares import make_place, needs_daemon, shared
from test_block import DEVICE, needs_device

from katashim.errors import InvalidArgument, NotFound, Unsupported
from katashim.resources import block, mounts, volume

PASSTHROUGH = "/run/kata-containers/shared/containers/passthrough/"


def prepare(*spec_mounts, share=None, vm=None, agent=None, undo=None):
    return volume.prepare("c1", list(spec_mounts), sandbox_id="s1", sharefs=share, vm=vm or DiskVm(), agent=agent,
                          undo=stack() if undo is None else undo)


def bind(source, destination="/data", *options):
    return {"destination": destination, "type": "bind", "source": str(source), "options": list(options or ("rbind",))}


# -- what the guest has of its own --------------------------------------------------------------------
UNCHANGED = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "gid=5"]},
    {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue"},
    {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
    {"destination": "/scratch", "type": "tmpfs"},
    bind("/proc/sys/kernel", "/host/kernel"), bind("/sys/fs/cgroup", "/host/cgroup"), bind("/dev/null", "/masked"),
    bind("/dev", "/dev"), {"destination": "/weird", "type": "", "source": "x"},
]


@pytest.mark.parametrize("mount", UNCHANGED, ids=lambda mount: mount["destination"])
def test_mounts_that_mean_the_guests_kernel_pass_unchanged(mount):
    assert prepare(mount) == ([mount], [])


@pytest.mark.parametrize("mount", [
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]},
    bind("/dev/shm", "/dev/shm"), bind("/dev/shm", "/dev/shm/")], ids=["tmpfs", "bind", "slash"])
def test_shared_memory_is_the_sandboxs(mount):
    found = prepare(mount)
    assert found.storages == []
    assert found.mounts[0]["source"] == "/run/kata-containers/sandbox/shm"
    assert (found.mounts[0]["type"], found.mounts[0]["options"]) == ("bind", ["rbind"])


def test_the_order_of_the_spec_is_kept():
    assert [mount["destination"] for mount in prepare(*UNCHANGED).mounts] == [
        mount["destination"] for mount in UNCHANGED]


# -- what cannot be ------------------------------------------------------------------------------------
def test_sources_that_a_guest_cannot_use(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        for name in ("socket", "FIFO"):
            with pytest.raises(Unsupported, match=f"is a {name} of the host: .*cannot be mounted at /data"):
                prepare(bind(tmp_path / name.lower()))
    with pytest.raises(NotFound, match="the source .*/gone of the mount at /data: No such file"):
        prepare(bind(tmp_path / "gone"))
    for source in ("", "relative"):
        with pytest.raises(InvalidArgument, match="at /data has no absolute source"):
            prepare(bind(source))
    with pytest.raises(Unsupported, match="at /data has id mappings"):
        prepare({**bind(tmp_path), "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]})


# -- disks --------------------------------------------------------------------------------------------
@needs_device
@pytest.mark.parametrize("options, readonly", [(("rbind", "rprivate"), False), (("rbind", "ro"), True)])
def test_a_device_node_becomes_a_disk(options, readonly):
    vm, undo, path = DiskVm(), stack(), DEVICE[0]
    found = prepare(bind(path, "/dev/xvdz", *options), bind(path, "/data", *options), vm=vm, undo=undo)
    node, data = found.storages
    readonly = readonly or block.is_readonly(path)
    assert [disk.readonly for disk in vm.seen] == [readonly] * 2
    assert (node.driver, node.source, node.fstype, node.options) == ("blk", "02/01", "bind", ("bind",))
    fstype = block.filesystem_of(path)
    if fstype:
        assert (data.fstype, "ro" in data.options) == (fstype, readonly)
    for storage, mount in zip(found.storages, found.mounts, strict=True):
        assert storage.mount_point.startswith("/run/kata-containers/sandbox/storage/c1-disk-")
        assert mount["source"] == storage.mount_point and mount["options"] == list(options)
    assert undo.unwind() == [] and vm.disks == {}


@needs_device
def test_a_filesystem_on_a_device_is_mounted_in_the_guest():
    found = prepare({"destination": "/data", "type": "xfs", "source": DEVICE[0], "options": ["ro", "noatime"]})
    assert found.storages[0][:4] == ("blk", "02/01", "xfs", ("noatime", "ro", "nouuid"))
    assert found.mounts == [{"destination": "/data", "type": "bind", "source": found.storages[0].mount_point,
                             "options": ["rbind", "ro"]}]


# -- without a share ----------------------------------------------------------------------------------
def test_files_and_read_only_directories_are_copied(tmp_path):
    (tmp_path / "guest").mkdir()
    (tmp_path / "hosts").write_text("127.0.0.1 localhost")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("s3cret")
    files = GuestFiles(tmp_path / "guest")
    with served(files, tmp_path / "agent.sock") as agent:
        found = prepare(bind(tmp_path / "hosts", "/etc/hosts", "rbind", "rw"),
                        bind(tmp_path / "secret", "/run/secrets/", "rbind", "ro"), agent=agent)
        assert found.storages == []
        hosts, secret = (mount["source"] for mount in found.mounts)
        name, _, suffix = os.path.basename(hosts).rpartition("-")
        assert (name[:3], len(name), suffix) == ("c1-", 3 + 16, "hosts")
        assert os.path.basename(secret).endswith("-secrets")
        assert open(files.path(hosts)).read() == "127.0.0.1 localhost"  # noqa: SIM115
        assert os.listdir(files.path(secret)) == ["key"]
        assert found.mounts[1]["options"] == ["rbind", "ro"]
        with pytest.raises(Unsupported, match="what it writes would be lost: set shared_fs = virtio-fs"):
            prepare(bind(tmp_path / "secret", "/data", "rbind", "rw"), agent=agent)


def test_an_empty_dir_without_a_share_lies_in_the_guest(tmp_path):
    source = tmp_path / "pods/1/volumes/kubernetes.io~empty-dir/cache"
    source.mkdir(parents=True)
    os.chown(source, 0, 77)
    found = prepare(bind(source, "/cache", "rbind", "rprivate", "rw"))
    path = PASSTHROUGH + "s1/rootfs/local/cache"
    assert found.storages[0][:5] == ("local", "local", "local", ("mode=0777", "fsgid=77"), path)
    assert found.mounts == [{"destination": "/cache", "type": "bind", "source": path,
                             "options": ["rbind", "rprivate", "rw"]}]


# -- with a share -------------------------------------------------------------------------------------
@pytest.fixture
def place(tmp_path, monkeypatch):
    make_place(tmp_path, monkeypatch)
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/file").write_text("x")
    return tmp_path


def on_host(place, mount, view="ro"):
    return place / "shared/s1" / view / "passthrough" / mount["source"][len(PASSTHROUGH):]


@needs_daemon
@private_mounts
def test_binds_of_a_pod(place):
    """The binds that containerd's CRI plugin gives to every container, and a volume of two of them."""
    for name in ("resolv.conf", "hostname", "hosts"):
        (place / name).write_text(name)
    with shared() as share:
        first, second = stack(), stack()
        files = [bind(place / name, f"/etc/{name}", "rbind", "rprivate", "rw")
                 for name in ("resolv.conf", "hostname", "hosts")]
        one = prepare(*files, bind(place / "volume", "/data", "rbind", "rw"), share=share, undo=first)
        two = prepare(*files, bind(place / "volume", "/readers", "rbind", "ro"), share=share, undo=second)
        assert one.storages == two.storages == []
        assert [mount["source"] for mount in one.mounts] == [mount["source"] for mount in two.mounts]
        assert [on_host(place, mount).read_text() for mount in one.mounts[:3]] == ["resolv.conf", "hostname", "hosts"]
        assert one.mounts[3] == {"destination": "/data", "type": "bind", "source": one.mounts[3]["source"],
                                 "options": ["rbind", "rw"]}
        assert two.mounts[3]["options"] == ["rbind", "ro"]
        (on_host(place, one.mounts[3]) / "new").write_text("written")
        assert first.unwind() == []
        assert (on_host(place, two.mounts[3]) / "new").read_text() == "written"
        assert second.unwind() == []
        assert os.listdir(place / "shared/s1/rw/passthrough") == []
    assert (place / "volume/new").exists()


@needs_daemon
@private_mounts
def test_read_only_volumes_are_so_on_the_host(place):
    with shared() as share:
        undo = stack()
        mount, = prepare(bind(place / "volume", "/data", "rbind", "ro"), share=share, undo=undo).mounts
        for view in ("rw", "ro"):
            with pytest.raises(OSError, match="Read-only"):
                (on_host(place, mount, view) / "new").write_text("x")
        assert undo.unwind() == []


@needs_daemon
@private_mounts
def test_propagation_of_a_volume(place):
    """rbind takes the mounts inside along; rslave also those that come later."""
    source = str(place / "volume")
    for name in ("now", "later"):
        os.mkdir(f"{source}/{name}")
    mounts.bind(source, source)
    mounts.set_propagation(source, mounts.MS_SHARED)
    mounts.mount("tmpfs", source + "/now", "tmpfs")
    os.mkdir(source + "/now/inside")
    with shared() as share:
        undo = stack()
        found = prepare(bind(source, "/plain", "bind"), bind(source, "/deep", "rbind", "rprivate"),
                        bind(source, "/follows", "rbind", "rslave"), share=share, undo=undo).mounts
        mounts.mount("tmpfs", source + "/later", "tmpfs")
        os.mkdir(source + "/later/inside")
        seen = {mount["destination"]: [bool(os.listdir(on_host(place, mount) / name)) for name in ("now", "later")]
                for mount in found}
        assert seen == {"/plain": [False, False], "/deep": [True, False], "/follows": [True, True]}
        assert undo.unwind() == []
    assert len(mounts.at_or_below(source)) == 3


@needs_daemon
@private_mounts
def test_an_empty_dir_in_memory_is_a_tmpfs_of_the_guest(place):
    source = place / "pods/1/volumes/kubernetes.io~empty-dir/scratch"
    source.mkdir(parents=True)
    with shared() as share:
        undo = stack()
        on_disk = prepare(bind(source, "/scratch", "rbind"), share=share, undo=undo)
        assert on_disk.storages == [] and on_disk.mounts[0]["source"].startswith(PASSTHROUGH + "sandbox-")
        mounts.mount("tmpfs", str(source), "tmpfs")
        os.chown(source, 0, 55)
        for destination in ("/scratch", "/dev/shm"):
            found = prepare(bind(source, destination, "rbind"), share=share, undo=undo)
            path = "/run/kata-containers/sandbox/ephemeral/scratch"
            assert found.storages[0][:5] == ("ephemeral", "tmpfs", "tmpfs", ("fsgid=55",), path)
            assert found.mounts[0]["source"] == path
        assert undo.unwind() == []
