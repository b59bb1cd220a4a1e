"""The verb delete, by the real program, with real processes and mounts of a sandbox whose shim is dead."""

import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest

from katashim import child, undo
from katashim.resources import mounts
from katashim.resources.releases import RELEASES
from katashim.shim import delete, endpoint
from katashim.ttrpc import proto

from .conftest import PROGRAM, ROOT, flags_for

Response = proto.get("containerd.task.v2.DeleteResponse")
MEMBER = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s1"}


@pytest.fixture
def run_root(tmp_path):
    """What stands in for /run/kata; whatever is mounted below is unmounted in the end."""
    path = tmp_path / "run"
    path.mkdir()
    yield str(path)
    mounts.unmount_below(str(tmp_path))


@pytest.fixture
def process():
    """Starts processes that live until their stdin ends; the living are ended."""
    made = []

    def make():
        made.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
        return made[-1]
    yield make
    for each in made:
        each.kill()
        each.communicate()


@pytest.fixture
def sandbox(run_root, process):
    """Makes a sandbox directory with a journal; returns its undo stack."""
    made = []

    def make(sandbox_id, owner=None):
        """:param owner: the shim, a living process; else one that is dead already."""
        directory = os.path.join(run_root, sandbox_id)
        os.mkdir(directory)
        if owner is None:
            owner = process()
            header = {"pid": owner.pid, "start_time": child.start_time(owner.pid)}
            owner.kill()
            owner.wait()
        else:
            header = {"pid": owner.pid, "start_time": child.start_time(owner.pid)}
        made.append(undo.Undo(os.path.join(directory, "journal"), RELEASES, header=header))
        return made[-1]
    yield make
    for stack in made:
        stack.close()


@pytest.fixture
def run(shims, run_root):
    """Runs delete; returns ``(DeleteResponse, stderr)``."""
    def run(container_id, bundle):
        done = shims.delete(container_id, bundle, environment={"KATASHIM_RUN_ROOT": run_root})
        assert done.returncode == 0, done.stderr
        return Response.FromString(done.stdout), done.stderr.decode()
    return run


def path_of(shims, sandbox_id):
    return endpoint.socket_path(shims.socket_dir, "/run/c.sock", "k8s.io", sandbox_id)


# -- the answer -----------------------------------------------------------------------------------
def test_the_answer_is_137_and_the_time_even_when_there_is_nothing(shims, run):
    before = time.time_ns()
    response, errors = run("c1", shims.bundle("c1"))
    assert (response.exit_status, response.pid, errors) == (137, 0, "")
    assert before <= proto.time_ns(response.exited_at) <= time.time_ns()


def test_a_bundle_that_is_gone_is_no_reason_to_fail(shims, run, sandbox, run_root, tmp_path):
    sandbox("s1")
    done = shims.run(str(tmp_path), *flags_for("s1"), "-bundle", str(tmp_path / "gone"), "delete",
                     environment={"KATASHIM_RUN_ROOT": run_root})
    assert Response.FromString(done.stdout).exit_status == 137
    assert os.listdir(run_root) == []


def test_a_bad_id_is_refused(shims, run_root):
    done = shims.delete("../../etc", shims.bundle("c1"), environment={"KATASHIM_RUN_ROOT": run_root})
    assert done.returncode == 1 and done.stdout == b"" and b"not valid" in done.stderr


def test_it_needs_no_gevent_and_no_protobuf(tmp_path):
    look = ("import sys; sys.path.insert(0, sys.argv[1])\n"
            "import katashim.shim.delete, katashim.resources.releases\n"
            "print([name for name in sys.modules if name.startswith(('gevent', 'google'))])")
    done = subprocess.run([sys.executable, "-IS", "-c", look, ROOT], capture_output=True, check=True)
    assert done.stdout == b"[]\n"


# -- a dead shim ----------------------------------------------------------------------------------
def test_what_a_dead_shim_left_is_removed_and_the_users_data_stays(shims, run, sandbox, run_root, process, tmp_path):
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "deep" / "file").write_text("precious")
    vmm = process()
    stack = sandbox("s1")
    stack.push("process", pid=vmm.pid, start_time=child.start_time(vmm.pid), name="QEMU")
    shared = os.path.join(run_root, "s1", "shared")
    stack.push("tree", path=shared)
    os.mkdir(shared)
    stack.push("mount", target=shared)
    mounts.mount("tmpfs", shared, "tmpfs")
    os.mkdir(f"{shared}/volume")
    mounts.bind(str(data), f"{shared}/volume")      # known to the journal by nothing but the tree's path
    bundle = shims.bundle("s1")

    response, errors = run("s1", bundle)

    assert (response.exit_status, errors) == (137, "")
    assert vmm.wait(5) == -9
    assert (data / "deep" / "file").read_text() == "precious"
    assert os.listdir(run_root) == []
    assert not mounts.at_or_below(run_root)


def test_a_stranger_that_got_the_pid_is_not_killed(shims, run, sandbox, process):
    stranger = process()
    sandbox("s1").push("process", pid=stranger.pid, start_time=child.start_time(stranger.pid) - 1, name="QEMU")
    assert run("s1", shims.bundle("s1"))[1] == ""
    assert stranger.poll() is None


def test_it_can_be_called_again(shims, run, sandbox, run_root):
    sandbox("s1")
    bundle = shims.bundle("s1")
    assert [run("s1", bundle)[0].exit_status for _ in range(3)] == [137] * 3
    assert os.listdir(run_root) == []


def test_of_several_at_once_each_answers_and_nothing_is_left(shims, sandbox, run_root, process):
    vmm = process()
    sandbox("s1").push("process", pid=vmm.pid, start_time=child.start_time(vmm.pid), name="QEMU")
    bundle = shims.bundle("s1")
    environment = {"KATASHIM_SOCKET_DIR": shims.socket_dir, "KATASHIM_RUN_ROOT": run_root}
    running = [subprocess.Popen([PROGRAM, *flags_for("s1"), "-bundle", bundle, "delete"], env=environment,
                                cwd=bundle, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    answers = [each.communicate(timeout=30) for each in running]
    assert [(Response.FromString(out).exit_status, errors) for out, errors in answers] == [(137, b"")] * 4
    assert vmm.wait(5) == -9
    assert os.listdir(run_root) == []


def test_what_cannot_be_released_is_told_and_tried_again_next_time(shims, run, sandbox, run_root, tmp_path):
    busy = tmp_path / "not empty"
    (busy / "something").mkdir(parents=True)
    sandbox("s1").push("dir", path=str(busy))
    bundle = shims.bundle("s1")
    response, errors = run("s1", bundle)
    assert response.exit_status == 137
    assert "not empty" in errors
    (busy / "something").rmdir()
    assert run("s1", bundle)[1] == ""
    assert not busy.exists() and os.listdir(run_root) == []


def test_a_directory_without_a_journal_is_not_ours(shims, run, run_root):
    os.makedirs(os.path.join(run_root, "s1", "of-another-runtime"))
    run("s1", shims.bundle("s1"))
    assert os.listdir(os.path.join(run_root, "s1")) == ["of-another-runtime"]


# -- a living shim --------------------------------------------------------------------------------
def test_a_sandbox_whose_shim_lives_is_left_alone(shims, run, sandbox, run_root, process, tmp_path):
    marker = tmp_path / "marker"
    marker.mkdir()
    sandbox("s1", owner=process()).push("dir", path=str(marker))
    listener = endpoint.listen(path_of(shims, "s1"))
    response, errors = run("s1", shims.bundle("s1"))
    assert response.exit_status == 137 and "the shim of the sandbox lives" in errors
    assert endpoint.accepts(path_of(shims, "s1")) and marker.exists()
    assert os.listdir(run_root) == ["s1"]
    listener.close()


def test_a_shim_that_is_about_to_exit_is_waited_for(shims, run, sandbox, run_root, process, tmp_path):
    shim, marker = process(), tmp_path / "marker"
    marker.mkdir()
    sandbox("s1", owner=shim).push("dir", path=str(marker))
    directory = os.open(os.path.join(run_root, "s1"), os.O_RDONLY)
    ended = []

    def end_shim():
        """When delete has the lock, it is looking at the shim."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(directory, fcntl.LOCK_UN)
            except BlockingIOError:
                break
        ended.append(marker.exists())
        shim.communicate()
    watcher = threading.Thread(target=end_shim)
    watcher.start()
    response, errors = run("s1", shims.bundle("s1"))
    watcher.join()
    os.close(directory)
    assert ended == [True]
    assert (response.exit_status, errors) == (137, "")
    assert not marker.exists() and os.listdir(run_root) == []


def test_a_pods_container_does_not_take_its_living_sandbox_along(shims, run, sandbox, run_root, process):
    sandbox("s1", owner=process())
    listener = endpoint.listen(path_of(shims, "s1"))
    bundle = shims.bundle("c2", MEMBER)
    rootfs = os.path.join(bundle, "rootfs")
    os.mkdir(rootfs)
    mounts.mount("tmpfs", rootfs, "tmpfs")
    response, errors = run("c2", bundle)
    assert response.exit_status == 137 and "is left to it" in errors
    assert os.listdir(run_root) == ["s1"]
    assert endpoint.accepts(path_of(shims, "s1"))
    assert not mounts.is_mount_point(rootfs)
    listener.close()


def test_a_pods_container_removes_the_sandbox_of_a_dead_shim(shims, run, sandbox, run_root):
    sandbox("s1")
    assert run("c2", shims.bundle("c2", MEMBER))[1] == ""
    assert os.listdir(run_root) == []


# -- the bundle and the socket --------------------------------------------------------------------
def test_the_rootfs_is_unmounted_and_what_it_showed_stays(shims, run, run_root, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_text("precious")
    bundle = shims.bundle("c1")
    rootfs = os.path.join(bundle, "rootfs")
    os.mkdir(rootfs)
    for _ in range(2):                          # stacked
        mounts.bind(str(data), rootfs)
    assert run("c1", bundle)[1] == ""
    assert os.listdir(rootfs) == [] and (data / "file").read_text() == "precious"


def test_a_rootfs_that_is_a_link_is_not_followed(shims, run, tmp_path, run_root):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    mounts.mount("tmpfs", str(elsewhere), "tmpfs")
    bundle = shims.bundle("c1")
    os.symlink(elsewhere, os.path.join(bundle, "rootfs"))
    run("c1", bundle)
    assert mounts.is_mount_point(str(elsewhere))


def test_a_stale_socket_is_removed(shims, run):
    endpoint.listen(path_of(shims, "c1")).close()
    run("c1", shims.bundle("c1"))
    assert shims.sockets() == []


def test_the_socket_is_found_where_start_put_it(shims, run, socket_dir):
    other = os.path.join(socket_dir, "other")
    recorded = os.path.join(other, os.path.basename(path_of(shims, "c1")))
    endpoint.listen(recorded).close()
    bundle = shims.bundle("c1")
    with open(os.path.join(bundle, "address"), "w") as file:
        file.write("unix://" + recorded)
    run("c1", bundle)
    assert os.listdir(other) == []


def test_an_address_that_names_any_other_file_is_not_believed(shims, run, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("data")
    bundle = shims.bundle("c1")
    with open(os.path.join(bundle, "address"), "w") as file:
        file.write(f"unix://{precious}")
    run("c1", bundle)
    assert precious.exists()


# -- in time --------------------------------------------------------------------------------------
def test_the_answer_does_not_wait_for_work_that_hangs():
    reader, writer = os.pipe()
    started = time.monotonic()

    def hang():
        os.close(writer)            # so that the end of file comes when the test closes its own
        os.read(reader, 1)
        return []
    try:
        assert b"goes on in the background" in delete._in_child(0.1, hang)
        assert time.monotonic() - started < 5
    finally:
        os.close(writer)            # ends the child
        os.close(reader)
        os.wait()


def test_problems_and_crashes_of_the_work_are_told():
    assert delete._in_child(10, lambda: ["one", "two"]) == b"one\ntwo\n"
    assert b"ZeroDivisionError" in delete._in_child(10, lambda: 1 / 0)
