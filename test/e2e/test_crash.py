"""kill -9 of everything, at every phase: containerd's view ends consistent, and nothing is left.

Most tests have a containerd of their own, for containerd is one of those who are killed.
"""

import os
import signal
import time

import pytest
from direct_shim import make_root, spec
from event_listener import Listener
from harness import leaks
from live_pods import FOREVER, Pod, api_of, pid_of, shim_pid, state, wait_for

from katashim import child
from katashim.errors import FailedPrecondition
from katashim.ttrpc import proto

pytestmark = pytest.mark.vm

_SOON_S = 30


@pytest.fixture
def clean(mortal_daemon, name):
    """``clean()``: wait until nothing is left of any container."""
    word = name().rpartition("-")[0]
    before = leaks.snapshot(scope=(word,), directories=mortal_daemon.traces())

    def check():
        # A containerd that was started again is another process than before.
        end = time.monotonic() + _SOON_S
        while left := [thing for thing in leaks.compare(before) if not is_containerd(thing)]:
            assert time.monotonic() < end, left
            time.sleep(0.05)
    return check


def is_containerd(thing):
    return thing.startswith("process") and "containerd --config" in thing


def kill(pid):
    """SIGKILL, and wait until it is gone."""
    started = child.start_time(pid)
    os.kill(pid, signal.SIGKILL)
    assert child.wait_gone(pid, started, _SOON_S)


def remove(daemon, *containers):
    """Delete containers as an operator does after an accident; returns what ctr said of their tasks."""
    said = [daemon.ctr("task", "rm", "-f", container, check=False) for container in containers]
    for container in containers:
        daemon.ctr("container", "rm", container)
    return said


def victim_of(sandbox, what):
    """The pid of the "shim", "QEMU", "virtiofsd" or "vsock backend" of a sandbox, once it has one."""
    look = (lambda: shim_pid(sandbox)) if what == "shim" else (lambda: pid_of(sandbox, what))
    return wait_for(look, f"{what} of {sandbox} to be there")


VICTIMS = ("shim", "QEMU", "virtiofsd", "vsock backend")
# What ctr's wait ends with. (containerd 1.6 and 1.7 lose the answer with the shim, whoever made it.)
SEEN = {"shim": 1}
KILLED = 137


@pytest.mark.parametrize("victim", VICTIMS)
def test_while_it_runs(mortal_daemon, clean, name, victim):
    """The exit is told once, with 137; the container can be deleted, and its id be used again."""
    container = name()
    with Listener(mortal_daemon) as events:
        running = mortal_daemon.start_run(container, "sh", "-c", "echo ready; exec sleep 1000")
        running.read_line()
        kill(victim_of(container, victim))
        result = running.wait(_SOON_S)
        assert result.code == SEEN.get(victim, KILLED), result
        events.until("delete", container)
        told = [event.fields["exit_status"] for event in events.settle(container) if event.topic == "exit"]
    assert told == [KILLED]
    remove(mortal_daemon, container)
    clean()
    assert mortal_daemon.run(container, "echo", "again", options=["--rm"]).out == "again\n"


@pytest.mark.parametrize("victim", VICTIMS)
def test_while_it_boots(mortal_daemon, clean, name, victim):
    """The run fails with a reason, at once, and leaves nothing."""
    container = name()
    running = mortal_daemon.start_run(container, *FOREVER)
    kill(victim_of(container, victim))
    result = running.wait(_SOON_S)
    assert result.code == 1 and result.err.startswith("ctr: "), result
    if victim != "shim":
        assert victim.split()[0] in result.err
    remove_what_is_listed(mortal_daemon)
    clean()


def remove_what_is_listed(daemon):
    remove(daemon, *daemon.ctr("container", "ls", "-q").out.split())


@pytest.mark.parametrize("victim", ["shim", "QEMU", "virtiofsd"])
def test_while_it_is_deleted(mortal_daemon, clean, name, victim):
    """When the shim dies between Delete and Shutdown, containerd removes the bundle in which it would
    execute `delete`, and so may not: then the next shim of that id releases what is left."""
    container = name()
    mortal_daemon.run(container, *FOREVER, options=["-d"])
    pid = victim_of(container, victim)
    started = child.start_time(pid)
    deleting = mortal_daemon.start_ctr("task", "rm", "-f", container)
    wait_for(lambda: ended(container), "the container's process to end")
    child.kill_identity(pid, started)
    deleting.wait(_SOON_S)
    remove(mortal_daemon, container)
    if victim == "shim":
        assert mortal_daemon.run(container, "echo", "again", options=["--rm"]).out == "again\n"
    clean()


def ended(sandbox):
    """Whether the first container of a sandbox has ended, or all of it is gone."""
    described = state(sandbox)
    return described is None or all(one["status"] == "stopped" for one in described["containers"])


@pytest.mark.parametrize("victim", ["shim", "QEMU"])
def test_a_pods_members_all_end(mortal_daemon, clean, name, victim):
    with Pod(mortal_daemon, name("pod")) as pod:
        members = [name() for _ in range(2)]
        waiting = [pod.start_run(member, "sh", "-c", "echo ready; exec sleep 1000") for member in members]
        for one in waiting:
            one.read_line()
        kill(victim_of(pod.name, victim))
        for one in waiting:
            assert one.wait(_SOON_S).code == SEEN.get(victim, KILLED)
        remove(mortal_daemon, *members)
    clean()


def test_a_restarted_containerd_misses_nothing(mortal_daemon, clean, name):
    """The end of a process comes while containerd is away; it is told when it is back, once."""
    container = name()
    mortal_daemon.run(container, *FOREVER, options=["-d"])
    with api_of(mortal_daemon, container) as api:
        mortal_daemon.kill9()
        api.call("Kill", id=container, signal=9)
        assert api.call("Wait", id=container).exit_status == KILLED
        seen = size(mortal_daemon.log_path)
        mortal_daemon.start()

    def forwarded():
        with open(mortal_daemon.log_path) as log:
            log.seek(seen)
            return log.read().count("event forwarded\" ns=default topic=/tasks/exit")
    wait_for(forwarded, "the exit to reach the new containerd")
    assert mortal_daemon.tasks()[container][1] == "STOPPED"
    remove(mortal_daemon, container)
    clean()
    assert forwarded() == 1


def size(path):
    return os.stat(path).st_size


def test_containerd_while_a_container_runs(mortal_daemon, clean, name):
    """The container does not notice, and the new containerd finds it as it was."""
    container = name()
    mortal_daemon.run(container, *FOREVER, options=["-d"])
    before = mortal_daemon.tasks()
    mortal_daemon.kill9()
    mortal_daemon.start()
    assert mortal_daemon.tasks() == before
    assert mortal_daemon.ctr("task", "exec", "--exec-id", name("e"), container, "echo", "alive").out == "alive\n"
    remove(mortal_daemon, container)
    clean()


def test_containerd_while_it_boots(mortal_daemon, clean, name):
    """Nobody waits for that VM any more, and nobody will end it: it must end by itself."""
    container = name()
    running = mortal_daemon.start_run(container, *FOREVER)
    victim_of(container, "QEMU")
    mortal_daemon.kill9()
    running.wait(_SOON_S)
    mortal_daemon.start()
    remove_what_is_listed(mortal_daemon)
    clean()


def test_containerd_while_it_is_deleted(mortal_daemon, clean, name):
    container = name()
    mortal_daemon.run(container, *FOREVER, options=["-d"])
    deleting = mortal_daemon.start_ctr("task", "rm", "-f", container)
    wait_for(lambda: ended(container), "the container's process to end")
    mortal_daemon.kill9()
    deleting.wait(_SOON_S)
    mortal_daemon.start()
    remove_what_is_listed(mortal_daemon)
    clean()


def test_the_shim_and_its_vm_at_once(mortal_daemon, clean, name):
    container = name()
    running = mortal_daemon.start_run(container, "sh", "-c", "echo ready; exec sleep 1000")
    running.read_line()
    pids = [victim_of(container, what) for what in ("QEMU", "virtiofsd", "shim")]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert running.wait(_SOON_S).code == SEEN["shim"]
    remove(mortal_daemon, container)
    clean()


# -- between Create and Start, which ctr makes one -------------------------------------------------
@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(str(tmp_path_factory.mktemp("root") / "fs"))


def test_qemu_before_the_start(shims, root):
    """What was created has ended with 137; it cannot be started, but deleted; no other can be
    created beside it, with the reason."""
    with shims("unstarted", spec(*FOREVER, root=root)) as shim:
        shim.create()
        kill(victim_of(shim.name, "QEMU"))
        assert shim.api.call("Wait", id=shim.name, timeout_s=_SOON_S).exit_status == KILLED
        with pytest.raises(FailedPrecondition):
            shim.api.call("Start", id=shim.name)
        wait_for(lambda: state(shim.name) is None, "the teardown")
        with pytest.raises(FailedPrecondition, match="qemu killed by SIGKILL"):
            shim.create(shim.name + "-more")
        assert shim.api.call("Delete", id=shim.name).exit_status == KILLED


def test_the_shim_before_the_start(shims, root):
    """`delete` removes all by the journal and answers 137; a second one finds nothing to do."""
    shim = shims("journal", spec(*FOREVER, root=root))
    shim.start()
    shim.create()
    vmm = victim_of(shim.name, "QEMU")
    kill(shim.pid)
    for _ in range(2):
        done = shim.verb("delete")
        answer = proto.decode(proto.get("containerd.task.v2.DeleteResponse"), done.stdout)
        assert answer.exit_status == KILLED and answer.exited_at.seconds > 0
        assert done.stderr == b""
        assert child.start_time(vmm) is None
        assert not os.path.exists(f"/run/kata/{shim.name}")


def test_a_new_shim_takes_over_what_a_dead_one_left(shims, root):
    """`delete` may never have run: containerd was killed, too."""
    dead = shims("twice", spec("sh", "-c", "exit 4", root=root))
    dead.start()
    dead.create()
    vmm = victim_of(dead.name, "QEMU")
    kill(dead.pid)
    with dead:
        assert dead.create().pid != vmm
        assert child.start_time(vmm) is None
        dead.api.call("Start", id=dead.name)
        assert dead.api.call("Wait", id=dead.name).exit_status == 4
