"""The harness itself: a private containerd, its image, and a leak check that sees every kind of leak.

Runs containers with runc, so that what fails here is the harness and not katashim.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tarfile
import time

import pytest
from harness import containerd, image, leaks
from harness.containerd import RUNC, Containerd, Failed
from harness.terminal import PRINT_SIZE

needs_runc = pytest.mark.skipif(not (shutil.which("containerd") and shutil.which("runc")),
                                reason="containerd and runc are not installed")
WORD = f"leaktest{os.getpid()}"


@pytest.fixture(scope="module")
def runc_daemon():
    with Containerd() as running:
        running.import_busybox()
        yield running


def wait_for(look, deadline_s=5):
    """What `look` finds, as soon as it finds anything."""
    end = time.monotonic() + deadline_s
    while not (found := look()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def run(*argv):
    subprocess.run(argv, check=True, capture_output=True, timeout=10)


def test_the_image_is_the_same_each_time(tmp_path):
    first = image.write(str(tmp_path / "a.tar"))
    second = image.write(str(tmp_path / "b.tar"), files={})
    with open(first, "rb") as one, open(second, "rb") as two:
        assert one.read() == two.read()
    with tarfile.open(first) as archive:
        assert {"oci-layout", "index.json"} < set(archive.getnames())


@needs_runc
def test_a_container_runs_and_its_exit_status_is_seen(runc_daemon):
    result = runc_daemon.run(f"{WORD}-a", "/bin/sh", "-c", "echo out; echo err >&2; exit 7",
                        options=["--rm"], runtime=RUNC, code=7)
    assert (result.out, result.err) == ("out\n", "err\n")
    with pytest.raises(Failed, match="ended with 3"):
        runc_daemon.run(f"{WORD}-b", "/bin/sh", "-c", "exit 3", options=["--rm"], runtime=RUNC)


@needs_runc
def test_input_and_a_terminal(runc_daemon):
    echo = runc_daemon.run(f"{WORD}-c", "head", "-c", "9", options=["--rm"], runtime=RUNC, stdin=b"passed on")
    assert echo.out == "passed on"
    with runc_daemon.terminal("run", "--rm", "-t", "--runtime", RUNC, image.NAME, f"{WORD}-d", "sh", "-c",
                         f"{PRINT_SIZE}; read x; echo got $x; exit 5", rows=33, columns=99) as terminal:
        terminal.read_until(b"33 99")
        terminal.send(b"it\n")
        terminal.read_until(b"got it")
        assert terminal.wait()[0] == 5


@needs_runc
def test_ctr_that_hangs_is_killed(runc_daemon):
    with pytest.raises(Failed, match=r"no end within 0\.5 s"):
        runc_daemon.run(f"{WORD}-e", "sleep", "60", options=["--rm"], runtime=RUNC, timeout_s=0.5)
    assert runc_daemon.remove_all() == [f"{WORD}-e"]


@needs_runc
def test_containers_outlive_containerd():
    with Containerd() as running:
        running.import_busybox()
        running.run(f"{WORD}-f", "sleep", "1000", options=["-d"], runtime=RUNC)
        pid, status = running.tasks()[f"{WORD}-f"]
        assert status == "RUNNING"
        running.kill9()
        running.start()
        assert running.tasks()[f"{WORD}-f"] == (pid, "RUNNING")
        running.restart()
        running.ctr("task", "kill", "-s", "KILL", f"{WORD}-f")
        running.wait_status(f"{WORD}-f", "STOPPED")
        running.remove_all()
        assert running.tasks() == {}


@needs_runc
def test_nothing_is_left_of_a_container_and_of_containerd(tmp_path):
    with Containerd() as running:
        running.import_busybox()
        before = leaks.snapshot(scope=(running.directory, WORD), directories=running.traces())
        running.run(f"{WORD}-g", "sleep", "1000", options=["-d"], runtime=RUNC)
        there = leaks.compare(before)
        for kind in ("process", "mount", "file", "cgroup"):
            assert any(thing.startswith(kind) for thing in there), (kind, there)
        running.remove_all()
        leaks.check(before)
        directory = running.directory
    assert not os.path.exists(directory)


def test_containerd_that_cannot_start_says_why():
    running = Containerd(plugins="this is no TOML")
    try:
        with pytest.raises(Failed, match="containerd ended with 1"):
            running.start()
    finally:
        running.close()


# -- one leak of each kind ------------------------------------------------------------------------
@contextlib.contextmanager
def a_process(tmp_path):
    program = tmp_path / "virtiofsd"
    shutil.copy(shutil.which("sleep"), program)
    process = subprocess.Popen([program, "1000"])
    try:
        yield "process", f"{program} 1000"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def a_mount(tmp_path):
    run("mount", "-t", "tmpfs", "none", str(tmp_path))
    try:
        yield "mount", f"{tmp_path} (tmpfs)"
    finally:
        run("umount", str(tmp_path))


@contextlib.contextmanager
def a_second_mount_on_top(tmp_path):
    run("mount", "-t", "tmpfs", "none", "/mnt")
    try:
        run("mount", "-t", "tmpfs", "none", "/mnt")
        try:
            yield "mount", "/mnt (tmpfs) number 2"
        finally:
            run("umount", "/mnt")
    finally:
        run("umount", "/mnt")


@contextlib.contextmanager
def a_network_namespace(tmp_path):
    run("ip", "netns", "add", WORD)
    try:
        yield "file", f"/run/netns/{WORD}"
    finally:
        run("ip", "netns", "del", WORD)


@contextlib.contextmanager
def a_tap(tmp_path):
    run("ip", "tuntap", "add", "leak0", "mode", "tap")
    try:
        yield "link", "leak0 of type tun"
    finally:
        run("ip", "link", "del", "leak0")


@contextlib.contextmanager
def an_ingress(tmp_path):
    run("ip", "link", "add", "leak1", "type", "veth", "peer", "name", "leak2")
    try:
        run("tc", "qdisc", "add", "dev", "leak1", "ingress")
        yield "qdisc or filter", "ingress on leak1"
    finally:
        run("ip", "link", "del", "leak1")


@contextlib.contextmanager
def a_cgroup(tmp_path):
    top = "/sys/fs/cgroup"
    hierarchy = "" if os.path.exists(f"{top}/cgroup.controllers") else "/pids"
    os.mkdir(f"{top}{hierarchy}/{WORD}")
    try:
        yield "cgroup", f"{hierarchy}/{WORD}"
    finally:
        os.rmdir(f"{top}{hierarchy}/{WORD}")


@contextlib.contextmanager
def a_socket(tmp_path):
    os.makedirs("/run/containerd/s", exist_ok=True)
    path = f"/run/containerd/s/{WORD}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    try:
        yield "file", path
    finally:
        os.unlink(path)


@contextlib.contextmanager
def a_state_file(tmp_path):
    path = f"/run/kata/{WORD}"
    os.makedirs(path)
    try:
        yield "file", path
    finally:
        os.rmdir(path)


@contextlib.contextmanager
def a_loop_device(tmp_path):
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(1 << 20))
    device = subprocess.run(["losetup", "-f", "--show", backing], check=True, capture_output=True,
                            text=True).stdout.strip()
    try:
        yield "loop device", f"{os.path.basename(device)}: {backing}"
    finally:
        run("losetup", "-d", device)


@pytest.mark.parametrize("leak", [
    a_process, a_mount, a_second_mount_on_top, a_network_namespace, a_tap, an_ingress, a_cgroup, a_socket,
    a_state_file, pytest.param(a_loop_device, marks=pytest.mark.skipif(
        not os.path.exists("/dev/loop-control"), reason="the kernel has no loop devices"))],
    ids=lambda leak: leak.__name__)
def test_the_check_sees(leak, tmp_path):
    before = leaks.snapshot()
    with leak(tmp_path) as (kind, name):
        seen = wait_for(lambda: [thing for thing in leaks.compare(before)
                                 if thing.startswith(kind) and name in thing])
        assert len(seen) == 1, leaks.compare(before)
        with pytest.raises(leaks.LeakError) as raised:
            leaks.check(before, deadline_s=0)
        assert name in str(raised.value)
    assert not [thing for thing in leaks.wait_clean(before, 5) if thing == seen[0]]


def test_the_check_sees_into_a_network_namespace():
    path = f"/run/netns/{WORD}"
    run("ip", "netns", "add", WORD)
    try:
        before = leaks.snapshot(scope=(WORD,), netns=[path])
        assert leaks.compare(before) == []
        run("ip", "-n", WORD, "tuntap", "add", "tap0_kata", "mode", "tap")
        assert leaks.compare(before) == [f"link tap0_kata of type tun in {path}"]
        run("tc", "-n", WORD, "qdisc", "add", "dev", "tap0_kata", "ingress")
        assert f"qdisc or filter ingress on tap0_kata in {path}" in leaks.compare(before)
    finally:
        run("ip", "netns", "del", WORD)


def test_the_check_waits_for_what_goes_by_itself(tmp_path):
    before = leaks.snapshot(scope=(WORD,), directories=[str(tmp_path)])
    path = tmp_path / WORD
    path.write_text("")
    remover = subprocess.Popen(["sh", "-c", f"sleep 0.2; rm {path}"])
    began = time.monotonic()
    leaks.check(before, deadline_s=10)
    assert time.monotonic() - began < 5
    assert remover.wait(5) == 0


def test_open_fds_are_told_by_what_they_are():
    before = leaks.open_fds(os.getpid())
    with open("/dev/null"), socket.socket():
        assert sorted([*before, "/dev/null", "socket"]) == leaks.open_fds(os.getpid())
    assert leaks.open_fds(os.getpid()) == before


def test_our_shim_is_in_the_path_of_containerd():
    running = Containerd()
    try:
        found = shutil.which("containerd-shim-katashim-v2", path=running.env["PATH"])
        assert found == os.path.join(containerd.REPOSITORY, "bin", "containerd-shim-katashim-v2")
    finally:
        running.close()
