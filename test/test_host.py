"""What the host can do: the real probes on this machine, their caches, and their refusals."""

import json
import os
import subprocess
import sys
import time

import pytest

from katashim import host, kvm_probe
from katashim.errors import Unsupported


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache directory of the test's own."""
    monkeypatch.setattr(host, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- KVM ------------------------------------------------------------------------------------------
def test_the_verdict_on_kvm_is_what_the_probe_measures_here():
    answer = json.loads(subprocess.run([sys.executable, "-IS", kvm_probe.__file__], check=True,
                                       stdout=subprocess.PIPE, timeout=10).stdout)
    assert "error" in answer or 100_000 < answer["loops_per_s"] < 100_000_000_000
    verdict = host.kvm_usable()
    assert verdict.usable == (answer.get("loops_per_s", 0) >= 20_000_000)
    assert verdict.why


@pytest.mark.parametrize(("answer", "usable", "says"), [
    ({"loops_per_s": 3_100_000_000}, True, "natively: 3,100.0 million loops"),
    ({"loops_per_s": 120_000_000}, True, "natively"),
    ({"loops_per_s": 1_900_000}, False, "only emulates a guest's kernel, too slowly for Linux: 1.9 million"),
    ({"error": "KVM_CREATE_VM: Device or resource busy"}, False, "KVM does not work: KVM_CREATE_VM: Device"),
])
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm that opens")
def test_speed_decides(monkeypatch, answer, usable, says):
    monkeypatch.setattr(host, "_measure_kvm", lambda: answer)
    verdict = host.kvm_usable()
    assert verdict.usable is usable and says in verdict.why


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm that opens")
def test_kvm_is_measured_once_per_boot(monkeypatch, cache):
    measured = []
    monkeypatch.setattr(host, "_measure_kvm", lambda: measured.append(1) or {"loops_per_s": 10 ** 9})
    assert host.kvm_usable() == host.kvm_usable()
    assert len(measured) == 1
    monkeypatch.setattr(host, "_boot_id", lambda: "another boot")
    host.kvm_usable()
    assert len(measured) == 2
    (cache / "kvm.json").write_text('{"key"')           # cut off
    host.kvm_usable()
    assert len(measured) == 3
    assert os.listdir(cache) == ["kvm.json"]


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch):
    monkeypatch.setattr(host, "CACHE_DIR", "/proc/nowhere")
    assert host._cached("x", 1, lambda: {"it": 42}) == {"it": 42}


def test_a_failure_is_not_kept(cache):
    assert host._cached("x", 1, lambda: {"error": "busy"}) == {"error": "busy"}
    assert host._cached("x", 1, lambda: {"it": 42}) == {"it": 42}
    assert host._cached("x", 1, lambda: {"error": "busy"}) == {"it": 42}


def test_without_the_device(monkeypatch):
    def missing(path, flags):
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(host.os, "open", missing)
    assert host.kvm_usable()[0] is False
    assert "there is no /dev/kvm" in host.kvm_usable().why
    assert host.vhost_net_available() == (False, "there is no /dev/vhost-net (module vhost_net is not loaded)")


def test_a_device_that_may_not_be_opened(monkeypatch):
    def forbidden(path, flags):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(host.os, "open", forbidden)
    assert host.kvm_usable() == (False, "/dev/kvm cannot be opened: Permission denied")
    assert host.tun_available() == (False, "/dev/net/tun cannot be opened: Permission denied")


@pytest.mark.parametrize(("program", "says"), [
    ("import time; time.sleep(60)", "did not end in 0.2 s"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the probe died"),
    ("print('{\"error\": \"no\"}')", "no"),
])
def test_a_probe_that_hangs_or_dies_harms_nobody(tmp_path, monkeypatch, program, says):
    (tmp_path / "kvm_probe.py").write_text(program)
    monkeypatch.setattr(host, "__file__", str(tmp_path / "host.py"))
    monkeypatch.setattr(host, "_PROBE_DEADLINE_S", 0.2)
    assert says in host._measure_kvm()["error"]


# -- the rest -------------------------------------------------------------------------------------
def test_the_clock_of_the_cpu_is_measured_and_kept(cache):
    first = host.tsc_khz()
    assert 500_000 < first < 10_000_000
    assert json.loads((cache / "tsc.json").read_text())["answer"] == {"khz": first}
    assert abs(host._measure_tsc()["khz"] - first) < first / 1000


def test_other_processors_have_no_such_clock(monkeypatch):
    monkeypatch.setattr(host.os, "uname", lambda: os.uname_result(("Linux", "h", "6", "1", "aarch64")))
    with pytest.raises(Unsupported, match="no time stamp counter on aarch64"):
        host.tsc_khz()


def test_where_executable_memory_is_forbidden(monkeypatch):
    import mmap

    def forbidden(*args, **options):
        raise PermissionError

    monkeypatch.setattr(mmap, "mmap", forbidden)
    with pytest.raises(Unsupported, match="executable memory is forbidden"):
        host._measure_tsc()


def test_sizes():
    assert host.online_cpus() == int(subprocess.run(["nproc", "--all"], check=True,
                                                    stdout=subprocess.PIPE).stdout)
    with open("/proc/meminfo") as lines:
        assert host.memory_mb() == int(lines.readline().split()[1]) // 1024
    assert host.hugepages_free_mb() >= 0


ROOT = "30 1 0:26 / /sys/fs/cgroup rw - {0} {0} rw\n"
UNIFIED = "31 30 0:27 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(("mounts", "mode"), [
    (ROOT.format("cgroup2"), "v2"),
    (ROOT.format("tmpfs") + UNIFIED, "hybrid"),
    (ROOT.format("tmpfs"), "v1"),
    (ROOT.format("tmpfs") + ROOT.format("cgroup2"), "v2"),
    ("", "v1"),
])
def test_cgroup_mode(tmp_path, mounts, mode):
    (tmp_path / "mountinfo").write_text(mounts)
    assert host.cgroup_mode(str(tmp_path / "mountinfo")) == mode


def test_the_checks_answer_each_with_a_reason():
    begun = time.monotonic()
    checks = host.checks()
    assert {name for name, _ in checks} == {"KVM", "vhost-vsock", "vhost-net", "tun/tap", "io_uring"}
    assert all(verdict.why for _, verdict in checks)
    assert time.monotonic() - begun < 5
