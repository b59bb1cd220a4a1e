"""What every hypervisor driver keeps, tested on each: the interface of katashim/drivers/base.py.

A driver is added by one row in DRIVERS. What only one of them can do is in its own tests.
"""

import os
import shutil
import signal
import tempfile
from types import SimpleNamespace

import gevent
import pytest
from fake_pod import FAKE_VMM
from qemu_vm import tiny_settings

from katashim import child, undo
from katashim.drivers import base
from katashim.drivers.fake import Fake
from katashim.drivers.qemu import Qemu
from katashim.errors import FailedPrecondition, HypervisorError, InvalidArgument, KatashimError, Unsupported
from katashim.resources.releases import RELEASES
from katashim.timeline import Timeline

WAIT_S = 15
CAPABILITIES = {value for name, value in vars(base).items() if name.isupper() and isinstance(value, str)}

# driver -> (class, settings of a VM that runs, settings that `prepare` must refuse)
DRIVERS = {
    "fake": (Fake, lambda directory: SimpleNamespace(), None),
    "qemu": (Qemu, tiny_settings, {"kernel": "/there/is/none"}),
}
needs_qemu = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed")


@pytest.fixture(params=[pytest.param(name, marks=needs_qemu if name == "qemu" else ()) for name in DRIVERS])
def driver(request, monkeypatch):
    monkeypatch.setenv("KATASHIM_FAKE_VMM", FAKE_VMM)
    monkeypatch.setenv("KATASHIM_FAKE_FAULTS", "")
    return request.param


@pytest.fixture
def stack():
    stack = undo.Undo(releases=RELEASES)
    yield stack
    assert stack.unwind() == []


@pytest.fixture
def directory():
    with tempfile.TemporaryDirectory(prefix="ks-", dir="/tmp") as path:
        yield path


@pytest.fixture
def vm(driver, directory, stack):
    cls, settings, _ = DRIVERS[driver]
    vm = cls("s1", directory, settings(directory), stack, timeline=Timeline())
    yield vm
    vm.stop(WAIT_S)


@pytest.fixture
def running(vm):
    vm.prepare()
    vm.start(WAIT_S)
    return vm


def gone(vm, traces):
    assert vm.pids() == [] and vm.vcpu_threads() == {}
    assert not [trace for trace in traces if child.is_alive(*trace)]


def identities(pids):
    return [(pid, child.start_time(pid)) for pid in pids]


def test_it_names_itself_and_what_it_can(driver):
    cls = DRIVERS[driver][0]
    assert cls.name == driver and issubclass(cls, base.Hypervisor)
    assert cls.capabilities and cls.capabilities <= CAPABILITIES


def test_before_its_start_there_is_nothing(vm, stack):
    assert (vm.pids(), vm.vcpu_threads(), vm.console_tail(), vm.wait(0)) == ([], {}, "", None)
    assert vm.describe()["name"] == vm.name
    vm.prepare()
    vm.stop(WAIT_S)
    assert vm.wait(0) is None


def test_a_life(vm, directory, stack):
    vm.prepare()
    vm.start(WAIT_S)
    traces = identities(vm.pids())
    assert traces and all(started for _, started in traces) and vm.wait(0) is None
    facts = vm.describe()
    assert facts["name"] == vm.name and (facts["pid"], facts["start_time"]) == traces[0] and facts["version"]
    assert vm.agent_address().partition("://")[0] in ("vsock", "hvsock", "unix")
    assert vm.agent_address().endswith(":1024")
    vm.stop(WAIT_S)
    end = vm.wait(0)
    assert isinstance(end, base.VmExit) and end.reason
    gone(vm, traces)
    vm.stop(WAIT_S)
    assert vm.wait(0) == end


def test_nothing_of_it_stays(running, directory, stack):
    running.stop(WAIT_S)
    assert stack.unwind() == []
    assert not [name for name in os.listdir(directory) if "sock" in name or "control" in name]


def test_its_vcpus_are_threads_of_it(running):
    threads = running.vcpu_threads()
    assert list(threads) == [0]
    assert os.path.exists(f"/proc/{running.pids()[0]}/task/{threads[0]}")


def test_its_console_is_kept(running):
    with gevent.Timeout(WAIT_S):
        while "kernel" not in running.console_tail():
            gevent.sleep(0.01)
    running.stop(WAIT_S)
    assert "kernel" in running.console_tail()


def test_verbs_at_the_wrong_time(vm):
    with pytest.raises(FailedPrecondition):
        vm.start(1)
    for verb in (vm.pause, vm.resume):
        with pytest.raises(FailedPrecondition):
            verb()
    vm.prepare()
    vm.start(WAIT_S)
    with pytest.raises(FailedPrecondition):
        vm.start(1)
    vm.stop(WAIT_S)
    for verb in (vm.pause, vm.resume, lambda: vm.start(1)):
        with pytest.raises(FailedPrecondition):
            verb()


def test_its_death_is_seen_by_all_who_wait(running):
    traces = identities(running.pids())
    waiting = [gevent.spawn(running.wait, WAIT_S) for _ in range(5)]
    os.kill(traces[0][0], signal.SIGKILL)
    ends = {each.get() for each in waiting}
    assert len(ends) == 1 and ends.pop().status == 137
    assert "killed by SIGKILL" in running.wait(0).reason
    running.stop(WAIT_S)
    gone(running, traces)


def test_one_that_hears_nothing_is_killed_in_time(running):
    traces = identities(running.pids())
    os.kill(traces[0][0], signal.SIGSTOP)
    with gevent.Timeout(WAIT_S):
        running.stop(1)
    assert running.wait(0).status == 137
    gone(running, traces)


def test_stop_in_the_middle_of_a_start(vm):
    vm.prepare()
    starting = gevent.spawn(vm.start, WAIT_S)
    with gevent.Timeout(WAIT_S):
        while not vm.pids():
            gevent.sleep(0.001)
    traces = identities(vm.pids())
    vm.stop(WAIT_S)
    starting.join(WAIT_S)
    assert starting.ready() and (starting.exception is None or isinstance(starting.exception, KatashimError))
    gone(vm, traces)


def test_a_killed_start_leaves_what_stop_can_end(vm):
    vm.prepare()
    starting = gevent.spawn(vm.start, WAIT_S)
    with gevent.Timeout(WAIT_S):
        while not vm.pids():
            gevent.sleep(0.001)
    traces = identities(vm.pids())
    starting.kill()
    vm.stop(WAIT_S)
    gone(vm, traces)


def test_a_pause_holds_and_a_resume_lets_go(running):
    running.pause()
    running.resume()
    assert running.wait(0) is None


def test_the_journal_knows_the_process_before_it_is_needed(driver, directory):
    """Whoever reads the journal after a crash finds the VMM by pid and start time, and ends it."""
    path = os.path.join(directory, "journal")
    stack = undo.Undo(path, RELEASES)
    cls, settings, _ = DRIVERS[driver]
    vm = cls("s1", directory, settings(directory), stack)
    vm.prepare()
    vm.start(WAIT_S)
    traces = identities(vm.pids())
    recorded = [(args["pid"], args["start_time"]) for _, kind, args in undo.read(path)[1] if kind == "process"]
    assert set(traces) <= set(recorded)
    assert undo.replay(path, RELEASES) == []
    assert not [trace for trace in traces if child.is_alive(*trace)]
    assert vm.wait(WAIT_S).status == 137
    vm.stop(WAIT_S)
    stack.unwind()
    stack.close()


def test_settings_that_cannot_work_are_refused_before_anything_starts(driver, directory, stack):
    cls, settings, wrong = DRIVERS[driver]
    if wrong is None:
        pytest.skip("it has none")
    record = settings(directory)._replace(**wrong)
    vm = cls("s1", directory, record, stack)
    with pytest.raises((InvalidArgument, HypervisorError), match=next(iter(wrong.values()))):
        vm.prepare()
    assert vm.pids() == []


@pytest.mark.parametrize("device", [base.VfioDevice("v", "0000:3b:00.0"), base.Vsock(), object()],
                         ids=lambda device: type(device).__name__)
def test_a_device_of_a_kind_that_it_does_not_know_is_unsupported(vm, device):
    vm.prepare()
    with pytest.raises(Unsupported, match=f"the {vm.name} driver does not support .*{type(device).__name__}"):
        vm.add_device(device)


def test_a_disk_gets_an_address_and_keeps_it(vm, directory):
    image = os.path.join(directory, "disk.img")
    with open(image, "wb") as file:
        file.truncate(1 << 20)
    disk = base.Disk(id="d1", path=image)
    vm.prepare()
    added = vm.add_device(disk)
    assert added.agent_type in ("blk", "mmioblk", "scsi", "nvdimm") and added.guest_address
    assert added._replace(agent_type="", guest_address="") == disk
    assert vm.add_device(disk) == added


def test_removing_what_was_never_added_is_no_error(running):
    running.remove_device(base.Disk(id="unknown", path="/dev/null"))


def test_what_a_driver_cannot_do_it_says_in_its_own_name(running, directory):
    with pytest.raises(Unsupported, match=f"the {running.name} driver does not support"):
        running.save(directory)
