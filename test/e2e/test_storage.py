"""Root filesystems and volumes, through virtio-fs and on disks."""

import os
import subprocess

import pytest
from direct_shim import make_root, spec
from live_pods import FOREVER

from katashim.errors import Unsupported

pytestmark = pytest.mark.vm


@pytest.fixture
def host_dir(tmp_path):
    """A directory of the user's with a file in it."""
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "file").write_text("of the host\n")
    return directory


def bind(source, target, mode):
    return ["--mount", f"type=bind,src={source},dst={target},options=rbind:{mode}"]


def test_a_bound_directory_is_shared_both_ways(pod, name, host_dir):
    result = pod.run(name(), "sh", "-c", "cat /data/file; echo of the guest >/data/new",
                     options=["--rm", *bind(host_dir, "/data", "rw")])
    assert result.out == "of the host\n"
    assert (host_dir / "new").read_text() == "of the guest\n"


def test_a_change_on_the_host_is_seen_in_the_guest(daemon, pod, name, host_dir):
    member = name()
    pod.run(member, *FOREVER, options=["-d", *bind(host_dir, "/data", "ro")])
    (host_dir / "later").write_text("came later\n")
    result = daemon.ctr("task", "exec", "--exec-id", name("e"), member, "cat", "/data/later")
    assert result.out == "came later\n"


def test_what_is_bound_read_only_cannot_be_written(pod, name, host_dir):
    result = pod.run(name(), "sh", "-c", "cat /data/file; echo x >/data/new", check=False,
                     options=["--rm", *bind(host_dir, "/data", "ro")])
    assert result.code == 1 and "Read-only file system" in result.err
    assert os.listdir(host_dir) == ["file"]


def test_a_file_can_be_bound(pod, name, host_dir):
    path = host_dir / "file"
    result = pod.run(name(), "sh", "-c", "cat /etc/one; echo changed >/etc/two",
                     options=["--rm", *bind(path, "/etc/one", "ro"), *bind(path, "/etc/two", "rw")])
    assert result.out == "of the host\n"
    assert path.read_text() == "changed\n"


def test_resolv_conf_hostname_and_hosts_are_the_mounted_ones(pod, name, tmp_path):
    options = ["--rm"]
    for file in ("resolv.conf", "hostname", "hosts"):
        (tmp_path / file).write_text(f"# the {file}\n")
        options += bind(tmp_path / file, f"/etc/{file}", "ro")
    result = pod.run(name(), "sh", "-c", "cat /etc/resolv.conf /etc/hostname /etc/hosts", options=options)
    assert result.out == "# the resolv.conf\n# the hostname\n# the hosts\n"


def test_users_data_survive_the_container(daemon, name, host_dir):
    """Also where the user has mounted something below a volume."""
    inner = host_dir / "inner"
    inner.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", inner], check=True)
    try:
        (inner / "kept").write_text("kept")
        result = daemon.run(name(), "ls", "/data/inner", options=["--rm", *bind(host_dir, "/data", "rw")])
        assert result.out == "kept\n"
        assert (inner / "kept").read_text() == "kept"
    finally:
        subprocess.run(["umount", inner], check=True)
    assert sorted(os.listdir(host_dir)) == ["file", "inner"]


def test_a_source_that_is_missing_is_named(pod, name, tmp_path):
    result = pod.run(name(), "true", options=["--rm", *bind(tmp_path / "no-such", "/data", "ro")], check=False)
    assert result.code == 1
    assert str(tmp_path / "no-such") in result.err


def test_tmpfs_and_shm_are_the_guests(pod, name):
    result = pod.run(name(), "sh", "-c", "grep -E ' (/scratch|/dev/shm) ' /proc/mounts; df -k /scratch /dev/shm",
                     options=["--rm", "--mount", "type=tmpfs,src=tmpfs,dst=/scratch,options=size=5m:noexec"])
    lines = result.out.splitlines()
    assert len([line for line in lines if " tmpfs " in line]) >= 2, result
    assert any("/scratch" in line and "5120" in line for line in lines), result
    assert any("/dev/shm" in line for line in lines)


def test_the_containers_of_a_pod_share_dev_shm(daemon, pod, name):
    member = name()
    pod.run(member, *FOREVER, options=["-d"])

    def execute(container, script):
        return daemon.ctr("task", "exec", "--exec-id", name("e"), container, "sh", "-c", script).out
    kind = execute(member, "grep ' /dev/shm ' /proc/mounts")
    assert " tmpfs " in kind


def test_a_read_only_root_cannot_be_written(pod, name):
    result = pod.run(name(), "sh", "-c", "echo x >/x", options=["--rm", "--read-only"], check=False)
    assert result.code == 1 and "Read-only file system" in result.err


def test_what_a_container_writes_to_its_root_goes_with_it(pod, name):
    """Also when its id is used again at once: the guest's caches must not know the old root by it."""
    member = name()
    for _ in range(2):
        result = pod.run(member, "sh", "-c", "ls /mark 2>/dev/null; echo x >/mark; cat /mark", options=["--rm"])
        assert result.out == "x\n"


# -- disks ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ext4_image(tmp_path_factory):
    """An ext4 image with busybox in it."""
    directory = tmp_path_factory.mktemp("image")
    root, path = make_root(str(directory / "fs")), str(directory / "root.ext4")
    with open(path, "wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-d", root, path], check=True, capture_output=True)
    return path


@pytest.fixture
def own_image(ext4_image, tmp_path):
    """A copy of it, to be written to."""
    path = str(tmp_path / "own.ext4")
    subprocess.run(["cp", "--sparse=always", ext4_image, path], check=True)
    return path


def run_on(shim, mounts):
    """Create the shim's container on a root of `mounts`, run it to its end; returns its exit status."""
    shim.create(rootfs=mounts, stdout=f"file://{shim.bundle}/out", stderr=f"file://{shim.bundle}/out")
    shim.api.call("Start", id=shim.name)
    return shim.api.call("Wait", id=shim.name).exit_status


def test_a_root_on_a_disk_needs_no_shared_filesystem(shims, own_image):
    script = "grep ' / ' /proc/mounts; echo written >/mark; sync; exit 7"
    with shims("disk", spec("sh", "-c", script), shared_fs="none") as shim:
        assert run_on(shim, [{"type": "ext4", "source": own_image, "options": ["loop"]}]) == 7
        with open(f"{shim.bundle}/out") as file:
            said = file.read()
    assert " / ext4 rw" in said
    found = subprocess.run(["debugfs", "-R", "cat /mark", own_image], check=True, capture_output=True, text=True)
    assert found.stdout == "written\n"


def test_an_erofs_layer_and_an_overlay_make_a_root(shims, ext4_image, tmp_path):
    """The list that containerd's EROFS snapshotter makes: images below, an overlay on top."""
    lower = str(tmp_path / "lower.erofs")
    subprocess.run(["mkfs.erofs", lower, os.path.dirname(ext4_image) + "/fs"], check=True,
                   capture_output=True)
    upper = str(tmp_path / "upper.ext4")
    with open(upper, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", upper], check=True, capture_output=True)
    mounts = [
        {"type": "erofs", "source": lower, "options": ["loop"]},
        {"type": "ext4", "source": upper, "options": ["loop"]},
        {"type": "format/mkdir/overlay", "source": "overlay",
         "options": ["X-containerd.mkdir.path={{ mount 1 }}/upper:0755",
                     "X-containerd.mkdir.path={{ mount 1 }}/work:0755",
                     "workdir={{ mount 1 }}/work", "upperdir={{ mount 1 }}/upper",
                     "lowerdir={{ overlay 0 0 }}"]},
    ]
    with shims("layers", spec("sh", "-c", "grep ' / ' /proc/mounts; echo x >/mark && exit 5"),
               shared_fs="none") as shim:
        status = run_on(shim, mounts)
        with open(f"{shim.bundle}/out") as file:
            said = file.read()
    assert status == 5, said
    assert " / overlay rw" in said


def test_a_directory_as_root_without_a_shared_filesystem_is_refused(shims, tmp_path):
    root = make_root(str(tmp_path / "fs"))
    with shims("nofs", spec("true", root=root), shared_fs="none") as shim, \
            pytest.raises(Unsupported, match="shared_fs"):
        shim.create()
