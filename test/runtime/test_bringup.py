"""katashim.runtime.bringup: the order of its steps, and that a step that fails leaves nothing behind."""

import os

import gevent
import pytest
from fake_pod import Daemon

from katashim import errors, green, state
from katashim.runtime import bringup

MEBIBYTE = 1 << 20


# -- up -------------------------------------------------------------------------------------------
def test_the_guest_is_asked_in_katas_order(pods):
    pod = pods()
    pod.start(pod.id, "sleep", "100")
    calls = [call for call in pod.order(ask="calls") if call != "GetOOMEvent"]
    assert calls[:5] == ["Check", "CreateSandbox", "GetGuestDetails", "CreateContainer", "ReadStdout"]
    assert pod.sandbox.life.state == "ready"


def test_state_json_tells_all_about_it(pods):
    pod = pods()
    pod.start(pod.id, "sleep", "100")
    record = state.read(pod.place.run_dir)
    assert (record["id"], record["namespace"], record["state"]) == (pod.id, "fake", "ready")
    assert record["shim_pid"] == os.getpid() and record["config"]["path"] == pod.place.config_path
    assert record["hypervisor"]["name"] == "fake" and record["agent"].startswith("hvsock://")
    container, = record["containers"]
    assert (container["id"], container["status"], container["execs"]) == (pod.id, "running", {})
    phases = [row["phase"] for row in record["timeline"]]
    assert phases == ["shim", "config", "prepare", "spawn", "kernel", "agent", "network", "sandbox",
                      "create", "start"]
    assert all(row["ms"] is not None for row in record["timeline"])


# -- what fails -----------------------------------------------------------------------------------
FAULTS = [
    ("boot=exit:3", errors.INTERNAL, "exited with status 3: fake: cannot open the kernel image", {}),
    ("boot=mute", errors.DEADLINE_EXCEEDED, "the fake VMM to be ready", {"boot_timeout_s": 1}),
    ("Check=die", errors.INTERNAL, "the VM of sandbox .* is gone: fake killed by SIGKILL", {}),
    ("Check=refuse:14", errors.UNAVAILABLE, "Check is refused", {}),
    ("CreateSandbox=refuse:13", errors.INTERNAL, "the guest's agent refused CreateSandbox", {}),
    ("CreateSandbox=die", errors.INTERNAL, "is gone: fake killed by SIGKILL", {}),
    ("CreateSandbox=hang", errors.DEADLINE_EXCEEDED, "did not answer CreateSandbox within 1 s",
     {"agent_timeout_s": 1}),
    ("CreateSandbox=hangup", errors.UNAVAILABLE, "CreateSandbox", {}),
    ("GetGuestDetails=refuse:12", errors.UNIMPLEMENTED, "GetGuestDetails", {}),
    ("GetGuestDetails=die", errors.INTERNAL, "is gone: fake killed by SIGKILL", {}),
]


@pytest.mark.parametrize("fault, code, text, settings", FAULTS, ids=[row[0] for row in FAULTS])
def test_a_bring_up_that_fails_tells_why_and_leaves_nothing(pods, fault, code, text, settings):
    pod = pods(fault, **settings)
    with pytest.raises(errors.KatashimError, match=text) as caught:
        pod.create(pod.id, "true", io=pod.streams())
    assert caught.value.code == code
    assert "--- phases:" in str(caught.value)
    assert pod.sandbox is None
    pod.nothing_is_left()
    pod.flush()
    assert pod.events.seen == []
    with pytest.raises(errors.NotFound):
        pod.status(pod.id)


def test_after_a_failure_another_create_may_try_again(pods):
    pod = pods("CreateSandbox=refuse:13")
    with pytest.raises(errors.Internal):
        pod.create(pod.id, "true")
    os.environ["KATASHIM_FAKE_FAULTS"] = ""
    pod.start(pod.id, "true")
    assert pod.wait(pod.id) == 0


def test_the_guests_last_words_are_with_the_error(pods):
    pod = pods("CreateSandbox=refuse:13")
    with pytest.raises(errors.Internal, match="--- guest console:\nfake kernel: booting\nkata-agent: listening"):
        pod.create(pod.id, "true")


def test_a_program_that_is_not_there(pods):
    pod = pods()
    os.environ["KATASHIM_FAKE_VMM"] = "/there/is/none --at all"
    with pytest.raises(errors.Internal, match="cannot start the fake VMM .*/there/is/none.*: No such file"):
        pod.create(pod.id, "true")
    pod.nothing_is_left()


def test_without_the_variable_there_is_no_fake(pods):
    pod = pods()
    os.environ["KATASHIM_FAKE_VMM"] = ""
    with pytest.raises(errors.InvalidArgument, match="KATASHIM_FAKE_VMM names no program"):
        pod.create(pod.id, "true")
    pod.nothing_is_left()


def test_a_hypervisor_without_a_driver_is_unsupported():
    with pytest.raises(errors.Unsupported, match="no driver for the hypervisor 'dragonball'; katashim has qemu$"):
        bringup.driver("dragonball")
    assert bringup.driver("qemu").name == "qemu"


def test_a_host_network_is_refused_before_anything_starts(pods):
    pod = pods(without_netns="false")
    with pytest.raises(errors.FailedPrecondition, match="wants the host's network"):
        pod.create(pod.id, "true")
    pod.nothing_is_left()


def test_a_configuration_that_is_none_leaves_nothing(pods):
    pod = pods(shared_fs="carrier-pigeon")
    with pytest.raises(errors.InvalidArgument, match=r"config.toml:\d+: .*carrier-pigeon"):
        pod.create(pod.id, "true")
    pod.nothing_is_left()


def test_a_device_that_the_vm_cannot_have_takes_virtiofsd_and_its_mounts_along(pods):
    pod = pods(kind=Daemon, shared_fs="virtio-fs")
    with pytest.raises(errors.Unsupported, match="fake driver does not support devices of the kind ShareFs"):
        pod.create(pod.id, "true")
    pod.nothing_is_left()
    assert os.listdir(os.path.join(pod.place.directory, "shared")) == []


# -- interrupted ----------------------------------------------------------------------------------
STAGES = {"boot=mute": None, "boot=silent": None, "CreateSandbox=hang": "CreateSandbox",
          "GetGuestDetails=hang": "GetGuestDetails", "CreateContainer=hang": "CreateContainer"}


@pytest.mark.parametrize("fault", STAGES)
def test_a_shutdown_in_the_middle_of_a_boot_is_heard(pods, fault):
    pod = pods(fault, kind=Daemon)
    creating = pod.spawn("Create", **pod.creation(pod.id, "true"))
    pod.await_call(STAGES[fault], after=0 if STAGES[fault] else -1)
    watch = green.Stopwatch(5)
    pod.shut_down()
    assert watch.left() > 0, "the shutdown took more than 5 s"
    creating.join(5)
    assert isinstance(creating.exception, errors.KatashimError)
    assert pod.await_exit()
    pod.nothing_is_left()


@pytest.mark.parametrize("fault", ["boot=silent", "CreateSandbox=hang"])
def test_a_client_that_goes_away_in_the_middle_of_a_boot_ends_it(pods, fault):
    pod = pods(fault, kind=Daemon)
    creating = pod.spawn("Create", **pod.creation(pod.id, "true"))
    pod.await_call(STAGES[fault], after=0 if STAGES[fault] else -1)
    pod.reconnect()
    creating.join(5)
    assert isinstance(creating.exception, errors.ConnectionClosed)
    with green.deadline(10, "the end of the sandbox"):
        while os.listdir(pod.place.run_root):
            gevent.sleep(0.02)
    pod.nothing_is_left()


# -- facts of the spec ----------------------------------------------------------------------------
def mounted(destination, **mount):
    return {"mounts": [{"destination": "/proc", "type": "proc"}, {"destination": destination, **mount}]}


def test_the_guests_dns_is_what_the_spec_mounts(tmp_path):
    (tmp_path / "resolv.conf").write_text("nameserver 10.0.0.1\nsearch a b\n\n")
    spec = mounted("/etc/resolv.conf", source=str(tmp_path / "resolv.conf"), type="bind")
    assert bringup.dns(spec) == ["nameserver 10.0.0.1", "search a b", ""]
    assert bringup.dns({}) == []


def test_a_resolv_conf_that_cannot_be_read_is_told(caplog):
    assert bringup.dns(mounted("/etc/resolv.conf", source="/there/is/none")) == []
    assert "the guest gets no DNS" in caplog.text


@pytest.mark.parametrize("mount, wanted", [
    ({"type": "bind", "source": "/dev/shm"}, 64 * MEBIBYTE),
    ({"type": "tmpfs", "source": "shm"}, 64 * MEBIBYTE),
    ({"type": "bind", "source": "/there/is/none"}, 64 * MEBIBYTE),
    ({"type": "bind", "source": "/"}, None)])
def test_the_size_of_shm_is_that_of_the_hosts_mount(mount, wanted):
    root = os.statvfs("/")
    assert bringup.shm_bytes(mounted("/dev/shm", **mount)) == (wanted or root.f_blocks * root.f_frsize)
