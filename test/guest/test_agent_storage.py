"""Storages: mounted for a container, counted, unmounted with the last that uses them."""

import os

import pytest
from plain_client import Refused

BASE = "/run/kata-containers"


def storage(driver, mount_point, source="none", fstype="tmpfs", options=(), driver_options=(), **fields):
    return {"driver": driver, "source": source, "fstype": fstype, "options": options,
            "mount_point": mount_point,
            "driver_options": driver_options, **fields}


def bind(source, destination):
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rw"]}


def test_an_ephemeral_volume_has_size_and_group(pod):
    path = f"{BASE}/sandbox/ephemeral/one"
    cid = pod.run("sleep", "100", mounts=[bind(path, "/v")], storages=[
        storage("ephemeral", path, "tmpfs", options=["fsgid=1234", "size=1048576"])])
    assert pod.output(cid, "sh", "-c", "busybox df -k /v | busybox awk 'NR==2 {print $2}'") == "1024\n"
    assert pod.output(cid, "busybox", "stat", "-c", "%g %a", "/v").split() == ["1234", "3777"]


def test_an_ephemeral_volume_is_shared_and_stays(pod):
    path = f"{BASE}/sandbox/ephemeral/two"
    request = storage("ephemeral", path, "tmpfs")
    one = pod.run("sh", "-c", "echo hello > /v/f", mounts=[bind(path, "/v")], storages=[request])
    assert pod.wait(one) == 0
    pod.remove(one)
    other = pod.run("cat", "/v/f", mounts=[bind(path, "/v")], storages=[request])
    assert pod.read(other) == b"hello\n"


def test_a_local_volume_has_mode_and_group(pod):
    path = f"{BASE}/sandbox/local/one"
    cid = pod.run("sleep", "100", mounts=[bind(path, "/v")], storages=[
        storage("local", path, "local", "local", options=["mode=0750", "fsgid=42"])])
    assert pod.output(cid, "busybox", "stat", "-c", "%g %a", "/v").split() == ["42", "2750"]


def test_an_overlay_as_the_root(pod, busybox_root, host_agent):
    lower, target = f"{BASE}/sandbox/lower", f"{BASE}/sandbox/merged"
    storages = [storage("virtio-fs", lower, busybox_root, "bind", ["bind"]),
                storage("overlayfs", target, "overlay", "overlay", [f"lowerdir={lower}",
                                                                   "io.katacontainers.fs-opt.overlay-rw"])]
    cid = pod.run("sh", "-c", "echo new > /made && cat /made", root=target, storages=storages)
    assert pod.read(cid) == b"new\n"
    assert not os.path.exists(f"{busybox_root}/made")
    assert target in host_agent.mount_points()
    pod.remove(cid)
    assert target not in host_agent.mount_points()
    assert lower not in host_agent.mount_points()


def test_directories_are_made_for_an_overlay(pod, busybox_root, host_agent):
    lower, target, upper = f"{BASE}/sandbox/lower2", f"{BASE}/sandbox/merged2", f"{BASE}/sandbox/rw"
    make = "io.katacontainers.volume.overlayfs.create_directory="
    cid = pod.run("sh", "-c", "echo new > /made", root=target, storages=[
        storage("virtio-fs", lower, busybox_root, "bind", ["bind"]),
        storage("overlayfs", target, "overlay", "overlay",
                [f"lowerdir={lower}", f"upperdir={upper}/u", f"workdir={upper}/w"],
                [f"{make}{upper}/u", f"{make}{upper}/w"])])
    assert pod.wait(cid) == 0
    with open(f"{host_agent.root}{upper}/u/made") as file:
        assert file.read() == "new\n"


def test_one_that_two_containers_use_goes_with_the_second(pod, busybox_root, host_agent):
    path = f"{BASE}/sandbox/counted"
    request = storage("virtio-fs", path, busybox_root, "bind", ["bind", "ro"])
    one = pod.run("sleep", "100", storages=[request])
    other = pod.run("sleep", "100", storages=[request])
    pod.remove(one)
    assert path in host_agent.mount_points()
    pod.remove(other)
    assert path not in host_agent.mount_points()


def test_a_failing_one_takes_those_before_it_along(pod, busybox_root, host_agent):
    path = f"{BASE}/sandbox/unwound"
    with pytest.raises(Refused, match="13: Failed to find the storage handler nonsense"):
        pod.create("true", storages=[storage("virtio-fs", path, busybox_root, "bind", ["bind"]),
                                     storage("nonsense", f"{path}-2")])
    assert path not in host_agent.mount_points()


def test_a_container_that_cannot_be_made_gives_them_back(pod, busybox_root, host_agent):
    path = f"{BASE}/sandbox/given-back"
    with pytest.raises(Refused, match="nope"):
        pod.create("/bin/nope", storages=[storage("virtio-fs", path, busybox_root, "bind", ["bind"])])
    assert path not in host_agent.mount_points()


def test_a_group_for_all_files_of_a_volume(pod, tmp_path):
    (tmp_path / "dir").mkdir(mode=0o700)
    (tmp_path / "dir" / "file").write_text("x")
    os.symlink("/etc/passwd", tmp_path / "link")
    before = os.stat("/etc/passwd")
    pod.run("sleep", "100", storages=[storage("virtio-fs", f"{BASE}/sandbox/grouped", str(tmp_path), "bind",
                                              ["bind"],
                                              fs_group={"group_id": 4321})])
    assert {os.stat(tmp_path / name).st_gid for name in (".", "dir", "dir/file")} == {4321}
    assert os.stat(tmp_path / "dir").st_mode & 0o7777 == 0o2770
    assert os.stat(tmp_path / "dir" / "file").st_mode & 0o660 == 0o660
    assert (os.stat("/etc/passwd").st_gid, os.stat("/etc/passwd").st_mode) == (before.st_gid, before.st_mode)


@pytest.mark.parametrize(("fields", "words"), [
    ({"source": ""}, "lacks source"), ({"fstype": ""}, "lacks source"), ({"options": ["loop"]}, "loop")])
def test_impossible_mounts(pod, fields, words):
    request = {**storage("virtio-fs", f"{BASE}/sandbox/impossible", "tmpfs"), **fields}
    with pytest.raises(Refused, match=words):
        pod.create("true", storages=[request])


def test_a_disk_that_does_not_come_is_named(pod):
    for driver, source, words in (("blk", "/dev/nope", "Timeout after 1s waiting for /dev/nope"),
                                  ("blk", "zz/1", "is no PCI path"), ("scsi", "x", "is no SCSI address"),
                                  ("mmioblk", "/dev/null", "/dev/null is not a block device")):
        with pytest.raises(Refused, match=words):
            pod.create("true", storages=[storage(driver, f"{BASE}/sandbox/disk", source, "ext4")])


def test_encrypted_storage_is_refused(pod):
    with pytest.raises(Refused, match="13: .*confidential data hub|not a block device"):
        pod.create("true", storages=[storage("mmioblk", f"{BASE}/sandbox/disk", "/dev/null", "ext4",
                                             driver_options=["encryption_key=ephemeral"])])


def test_configuration_is_followed(pod, tmp_path, host_agent):
    (tmp_path / "first").write_text("one")
    path = f"{BASE}/shared/containers/watchable/config"
    cid = pod.run("sleep", "1000", mounts=[bind(path, "/config")], storages=[
        storage("watchable-bind", path, str(tmp_path), "bind", ["bind"])])
    assert pod.output(cid, "cat", "/config/first") == "one"
    (tmp_path / "second").write_text("two")
    (tmp_path / "first").unlink()
    waits = ('i=0; until test "$(ls /config)" = second; '
             "do sleep 0.1; i=$((i+1)); test $i -lt 60 || exit 1; done")
    assert pod.output(cid, "sh", "-c", waits) == ""
    assert pod.output(cid, "cat", "/config/second") == "two"
    pod.remove(cid)
    assert path not in host_agent.mount_points()


def test_layers_need_an_upper_and_a_lower(pod):
    with pytest.raises(Refused, match="one ext4 upper layer"):
        pod.create("true", storages=[storage("erofs.multi-layer", "/x", "/dev/vdb", "erofs")])


def test_a_files_system_on_the_agent_is_measured(client):
    usage = client.call("GetVolumeStats", volume_guest_path="/run").usage
    assert [item.unit for item in usage] == [1, 2]
    assert usage[0].total >= usage[0].used + usage[0].available > 0
