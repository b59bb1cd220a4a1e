import json
import os

import pytest

from katashim import host
from katashim.config import files
from katashim.ctl.check_command import MISSING, OK, SLOWER, check_host
from katashim.ctl.main import main

PROGRAM = "#!/bin/sh\necho 'a VMM, version 9'\n"


@pytest.fixture
def toml(tmp_path, monkeypatch):
    """Writes a configuration whose guest and VMM exist, with more lines for the hypervisor."""
    monkeypatch.setattr(files, "OUR_DIRECTORY", f"{tmp_path}/etc")
    for name, text in (("vmm", PROGRAM), ("kernel", ""), ("image", "")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def write(lines=""):
        path = tmp_path / "a.toml"
        path.write_text(f"[hypervisor.qemu]\npath='{tmp_path}/vmm'\nkernel='{tmp_path}/kernel'\n"
                        f"image='{tmp_path}/image'\n{lines}\n")
        return str(path)
    return write


def findings(path):
    return {finding.name: finding for finding in check_host(path)}


def test_a_host_that_has_all(toml):
    found = findings(toml())
    assert found["qemu"].state == OK and found["qemu"].detail.endswith("/vmm: a VMM, version 9")
    assert found["configuration"].state == OK and found["virtiofsd"].state == OK
    assert found["privileges"].state == (OK if os.geteuid() == 0 else MISSING)
    assert f"{host.memory_mb()} MiB" in found["size"].detail and found["cgroups"].detail == host.cgroup_mode()


def test_kvm_is_what_the_probe_says(toml):
    verdict = host.kvm_usable()
    kvm = findings(toml())["KVM"]
    assert kvm.state == (OK if verdict.usable else SLOWER) and verdict.why in kvm.detail
    assert findings(toml("accel='kvm'"))["KVM"].state == (OK if verdict.usable else MISSING)


def test_a_vmm_that_is_not_there_or_does_not_run(toml, tmp_path):
    path = toml()
    (tmp_path / "vmm").write_text("#!/bin/sh\nexit 1\n")
    assert findings(path)["qemu"].state == MISSING
    (tmp_path / "vmm").write_text("#!/no/such/interpreter\n")
    assert "does not run" in findings(path)["qemu"].detail
    (tmp_path / "vmm").unlink()
    assert "is not there, or not executable" in findings(path)["qemu"].detail


def test_virtiofsd_is_needed_only_when_it_is_used(toml):
    assert "not needed" in findings(toml("shared_fs='none'"))["virtiofsd"].detail
    found = findings(toml("shared_fs='virtio-fs'\nvirtio_fs_daemon='/no/virtiofsd'"))["virtiofsd"]
    assert found.state == MISSING and "/no/virtiofsd" in found.detail


def test_vsock_backends(toml):
    has_kernels = os.access("/dev/vhost-vsock", os.R_OK | os.W_OK)
    assert findings(toml("vsock_backend='builtin'"))["vsock"].state == OK
    assert findings(toml("vsock_backend='kernel'"))["vsock"].state == (OK if has_kernels else MISSING)
    assert findings(toml())["vsock"].state == (OK if has_kernels else SLOWER)


def test_missing_guest_files(toml, tmp_path):
    path = toml()
    (tmp_path / "image").unlink()
    found = findings(path)["file"]
    assert found.state == MISSING and f"{tmp_path}/image, which does not exist" in found.detail


def test_a_broken_configuration_is_a_finding(toml):
    found = findings(toml("foo = 1"))
    assert found["configuration"].state == MISSING and "has no setting foo" in found["configuration"].detail
    assert "qemu" not in found


@pytest.mark.parametrize(("lines", "status", "verdict"), [
    ("", 0, "pods can run here"),
    ("virtio_fs_daemon='/no'\nshared_fs='virtio-fs'", 1, "pods cannot run here")])
def test_exit_status(toml, capsys, lines, status, verdict):
    path = toml(lines)
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK) or os.geteuid() != 0:
        status, verdict = 1, "pods cannot run here"
    assert main(["check", "--config", path]) == status
    assert verdict in capsys.readouterr().out
    assert main(["check", "--json", "--config", path]) == status
    data = json.loads(capsys.readouterr().out)
    assert data["usable"] is (status == 0) and {"name", "state", "detail"} == set(data["findings"][0])
