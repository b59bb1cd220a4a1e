"""katashim.drivers.fake: what it alone does. (test/contract has what every driver does.)"""

import os
import signal
import tempfile
from types import SimpleNamespace

import pytest
from fake_pod import FAKE_VMM

from katashim import child, undo
from katashim.agent.client import Agent
from katashim.drivers import base
from katashim.drivers.fake import Fake
from katashim.errors import ConfigError, DeadlineExceeded, HypervisorError, Unsupported
from katashim.resources.releases import RELEASES
from katashim.timeline import Timeline

WAIT_S = 10
DISK = base.Disk(id="d1", path="/dev/null")
NIC = base.Nic(id="n1", tap_name="tap0", mac="02:00:00:00:00:01")


@pytest.fixture
def directory():
    with tempfile.TemporaryDirectory(prefix="ks-", dir="/tmp") as path:
        yield path


@pytest.fixture
def stack(directory):
    stack = undo.Undo(os.path.join(directory, "journal"), RELEASES)
    yield stack
    stack.unwind()
    stack.close()


@pytest.fixture
def vm(directory, stack, monkeypatch):
    monkeypatch.setenv("KATASHIM_FAKE_VMM", FAKE_VMM)
    monkeypatch.setenv("KATASHIM_FAKE_FAULTS", "")
    vm = Fake("s1", directory, SimpleNamespace(), stack, timeline=Timeline())
    yield vm
    vm.stop()


@pytest.fixture
def running(vm):
    vm.prepare()
    vm.start(WAIT_S)
    return vm


def test_a_life(vm, stack):
    assert vm.pids() == [] and vm.vcpu_threads() == {} and vm.console_tail() == ""
    vm.prepare()
    vm.start(WAIT_S)
    pid, = vm.pids()
    assert vm.wait(0) is None and vm.describe()["pid"] == pid and vm.describe()["version"] == "1.0"
    assert list(vm.vcpu_threads()) == [0]
    agent = Agent(vm.agent_address())
    agent.connect(WAIT_S)
    assert agent.Version().agent_version == "4.1.0-fake"
    agent.close()
    assert "fake kernel: booting" in vm.console_tail()
    vm.stop()
    assert vm.wait(0) == base.VmExit(0, "exited with status 0")
    vm.stop()
    assert vm.pids() == []
    assert not [entry for entry in stack.entries() if entry.startswith("process")]


def test_without_a_program_it_is_no_driver(vm, monkeypatch):
    monkeypatch.delenv("KATASHIM_FAKE_VMM")
    with pytest.raises(ConfigError, match="KATASHIM_FAKE_VMM names no program"):
        vm.prepare()


def test_a_vmm_that_exits_at_once_is_told_with_its_words(vm, monkeypatch):
    monkeypatch.setenv("KATASHIM_FAKE_FAULTS", "boot=exit:4")
    vm.prepare()
    with pytest.raises(HypervisorError, match="exited with status 4: fake: cannot open the kernel"):
        vm.start(WAIT_S)
    assert vm.wait(0).status == 4


def test_a_vmm_that_never_gets_ready_is_killed(vm, monkeypatch):
    monkeypatch.setenv("KATASHIM_FAKE_FAULTS", "boot=mute")
    vm.prepare()
    with pytest.raises(DeadlineExceeded, match="the fake VMM to be ready"):
        vm.start(0.5)
    assert vm.wait(WAIT_S).status == 137 and vm.pids() == []


def test_the_guest_dies_with_it(running):
    agent = Agent(running.agent_address())
    agent.connect(WAIT_S)
    agent.CreateSandbox(sandbox_id="s1")
    agent.CreateContainer(container_id="c1", OCI={"Process": {"Args": ["sleep", "1000"], "Cwd": "/"}})
    agent.StartContainer(container_id="c1")
    family = descendants(running.pids()[0])
    assert len(family) == 2                     # the guest's first process, and the container's
    os.kill(running.pids()[0], signal.SIGKILL)
    for pid, started in family:
        assert child.wait_gone(pid, started, WAIT_S)
    agent.close()


def descendants(parent):
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat") as file:
                    ppid = int(file.read().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if ppid == parent:
                found.append((int(name), child.start_time(int(name))))
    return found


def test_a_paused_vm_answers_when_it_is_resumed(running):
    agent = Agent(running.agent_address())
    agent.connect(WAIT_S)
    running.pause()
    with pytest.raises(DeadlineExceeded):
        agent.Check(timeout_s=0.1)
    running.resume()
    assert agent.Check(timeout_s=WAIT_S).status == 1
    agent.close()


def test_devices_get_addresses_and_keep_them(vm):
    vm.prepare()
    disk, nic = vm.add_device(DISK), vm.add_device(NIC)
    assert disk.agent_type == "blk" and disk.guest_address and nic.guest_address != disk.guest_address
    assert vm.add_device(DISK) == disk
    vm.remove_device(disk)
    vm.remove_device(disk)


@pytest.mark.parametrize("device", [base.ShareFs("kataShared", "/s"), base.VfioDevice("v", "0000:3b:00.0"),
                                    base.VhostUserDevice("u", "blk", "/s"), base.Vsock()])
def test_other_devices_are_unsupported(vm, device):
    vm.prepare()
    for verb in (vm.add_device, vm.remove_device):
        with pytest.raises(Unsupported, match=f"fake driver .*{type(device).__name__}"):
            verb(device)
