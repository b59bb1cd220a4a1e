"""``katashim-ctl check``: every requirement of a host, with its state and, where it fails, the cure.

Each check looks at the real thing: the KVM probe runs code in a VM, programs are asked for their
version. Nothing is changed.
"""

import os
import shutil
import subprocess
from typing import NamedTuple

from katashim import host
from katashim.config import load
from katashim.config.validate import missing_files
from katashim.ctl import output
from katashim.errors import KatashimError
from katashim.resources import virtiofsd

OK, SLOWER, MISSING = "ok", "slower", "missing"
_COLOURS = {OK: "green", SLOWER: "yellow", MISSING: "red"}

_PROGRAM_S = 10                 # the longest that --version of anything may take
_MIN_MEMORY_MB = 1024


class Finding(NamedTuple):
    """The state of one requirement.

    :ivar state: OK, SLOWER (it works without, not as well) or MISSING (no pod can run).
    """

    name: str
    state: str
    detail: str


def add_arguments(parser):
    parser.add_argument("--config", metavar="PATH", help="the base file, instead of the search path")


def main(args):
    findings = check_host(os.path.abspath(args.config) if args.config else None)
    usable = all(finding.state != MISSING for finding in findings)
    rows = [(output.paint(finding.state.ljust(7), _COLOURS[finding.state]), finding.name, finding.detail)
            for finding in findings]
    rows.append((output.paint("pods can run here" if usable else "pods cannot run here",
                              "green" if usable else "red"), "", ""))
    output.emit(args, {"usable": usable, "findings": [finding._asdict() for finding in findings]},
                output.columns(rows[:-1]) + "\n\n" + rows[-1][0])
    return 0 if usable else 1


def check_host(config_path=None):
    """All Findings about this host, for the configuration at `config_path` or the one in force."""
    findings = [_root(), _memory(), _cgroups(), _tun(), _gateway()]
    try:
        config = load(config_path, env={} if config_path else None)
    except KatashimError as exc:
        return [*findings, Finding("configuration", MISSING, exc.message)]
    findings.append(Finding("configuration", OK, config.path))
    findings += [_kvm(config.hypervisor), _hypervisor(config.hypervisor), _virtiofsd(config.hypervisor),
                 _vsock(config.hypervisor), _vhost_net(config.hypervisor)]
    findings += [Finding("file", MISSING, problem) for problem in missing_files(config)]
    return findings


# -- the host -------------------------------------------------------------------------------------
def _root():
    if os.geteuid() == 0:
        return Finding("privileges", OK, "root")
    return Finding("privileges", MISSING,
                   f"run as root, not as user {os.geteuid()}: most of this cannot be seen")


def _gateway():
    import netifaces
    gateway = netifaces.gateways().get("default", {}).get(netifaces.AF_INET)
    if gateway:
        return Finding("network", OK, f"default gateway {gateway[0]} on {gateway[1]}")
    return Finding("network", SLOWER, "this host has no default gateway: pods reach what their own network reaches")


def _memory():
    size, cpus = host.memory_mb(), host.online_cpus()
    state = OK if size >= _MIN_MEMORY_MB else SLOWER
    return Finding("size", state, f"{size} MiB of memory, {cpus} CPUs")


def _cgroups():
    return Finding("cgroups", OK, host.cgroup_mode())


def _tun():
    if os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return Finding("tap devices", OK, "/dev/net/tun")
    return Finding("tap devices", MISSING, "/dev/net/tun cannot be opened: modprobe tun")


# -- the hypervisor and its helpers ---------------------------------------------------------------
def _kvm(hypervisor):
    verdict = host.kvm_usable()
    if verdict.usable:
        return Finding("KVM", OK, verdict.why)
    if hypervisor.accel == "kvm":
        return Finding("KVM", MISSING, f"accel = kvm, and {verdict.why}")
    return Finding("KVM", SLOWER, f"{verdict.why}; VMs run under TCG, QEMU's emulator")


def _hypervisor(hypervisor):
    return _program(hypervisor.name, hypervisor.path)


def _program(name, path):
    """Whether a program runs, with the first line of its ``--version``."""
    if not os.access(path, os.X_OK):
        return Finding(name, MISSING, f"{path} is not there, or not executable")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_PROGRAM_S,
                              check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return Finding(name, MISSING, f"{path} --version does not run: {exc}")
    lines = (done.stdout or done.stderr).strip().splitlines() or [f"{path} says nothing"]
    return Finding(name, OK if done.returncode == 0 else MISSING, f"{path}: {lines[0]}")


def _virtiofsd(hypervisor):
    if hypervisor.shared_fs != "virtio-fs":
        return Finding("virtiofsd", OK, f"not needed, shared_fs = {hypervisor.shared_fs}")
    try:
        path = virtiofsd.find(hypervisor.virtio_fs_daemon)
        return Finding("virtiofsd", OK, f"{path} ({virtiofsd.flavour(path)})")
    except KatashimError as exc:
        return Finding("virtiofsd", MISSING, exc.message)


def _vsock(hypervisor):
    wanted = hypervisor.vsock_backend
    program = hypervisor.vsock_backend_path or shutil.which("vhost-device-vsock")
    kernel = os.access("/dev/vhost-vsock", os.R_OK | os.W_OK)
    if wanted in ("auto", "kernel") and kernel:
        return Finding("vsock", OK, "/dev/vhost-vsock, the kernel's")
    if wanted == "kernel":
        return Finding("vsock", MISSING, "vsock_backend = kernel, and /dev/vhost-vsock cannot be opened: "
                                         "modprobe vhost_vsock")
    if wanted in ("auto", "vhost-device-vsock") and program:
        return Finding("vsock", SLOWER if wanted == "auto" else OK, f"{program}; no /dev/vhost-vsock")
    if wanted == "vhost-device-vsock":
        return Finding("vsock", MISSING, f"vsock_backend = {wanted}, and that program is not in PATH")
    return Finding("vsock", OK if wanted == "builtin" else SLOWER,
                   "katashim's own backend" + ("" if wanted == "builtin" else "; no /dev/vhost-vsock"))


def _vhost_net(hypervisor):
    if hypervisor.disable_vhost_net:
        return Finding("vhost-net", OK, "not wanted, disable_vhost_net is set")
    if os.access("/dev/vhost-net", os.R_OK | os.W_OK):
        return Finding("vhost-net", OK, "/dev/vhost-net")
    return Finding("vhost-net", SLOWER, "/dev/vhost-net cannot be opened: QEMU moves the packets itself")
