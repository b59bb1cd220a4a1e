"""The sandbox's control groups on the host, and who of the VM's processes and threads is in which.

As Kata does it: with `sandbox_cgroup_only` everything that belongs to the pod (shim, VMM, virtiofsd, vsock
backend) is in the pod's own cgroup. Without it, these are in an overhead cgroup that nothing limits, and
only the vCPUs are in the pod's. On the host, no limits but cpusets are set: CPU time and memory are
limited by the size of the VM, and the user's limits are applied in the guest.

Called by katashim.runtime.sandbox. What asks the kernel runs in a native thread: to move a process waits
for a grace period of the kernel's, to remove a cgroup for the processes in it.
"""

import logging
from typing import NamedTuple

from katashim.errors import InvalidArgument
from katashim.resources import cgroupfs
from katashim.resources.cgroupfs import Figures, remove_path

__all__ = ["Figures", "SandboxCgroup", "SandboxFigures", "cgroup_path", "format_cpus", "parse_cpus",
           "remove_path"]

log = logging.getLogger(__name__)

_MAX_CPU = 65535        # far above any kernel's NR_CPUS; keeps "0-4000000000" from becoming a list


class SandboxFigures(NamedTuple):
    """What a sandbox uses on the host."""

    sandbox: Figures
    overhead: Figures = None        # None when there is no overhead cgroup


class SandboxCgroup:
    """The cgroups of one sandbox.

    :param sandbox_id: names the default path and the overhead cgroup.
    :param cgroups_path: `linux.cgroupsPath` of the sandbox's spec, "" or None when it has none.
    :param runtime_config: `sandbox_cgroup_only` is read.
    :param undo: the sandbox's stack.
    :raises InvalidArgument: the path is impossible.

    :ivar path: the pod's cgroup, "kubepods/pod1/abc".
    :ivar overhead_path: the overhead cgroup, None with `sandbox_cgroup_only`.
    """

    def __init__(self, sandbox_id, cgroups_path, runtime_config, undo):
        self.path = cgroup_path(cgroups_path or "") or f"kata_sandboxed_pod/{sandbox_id}"
        self.overhead_path = None
        if not runtime_config.sandbox_cgroup_only:
            self.overhead_path = (cgroup_path(f"kata-overhead.slice:runtime-rs:{sandbox_id}")
                                  if _is_systemd(cgroups_path or "") else f"kata_overhead/{sandbox_id}")
        self._undo = undo
        self._entries = []
        self._cpusets = {}

    def enter(self, pid):
        """Make the cgroups and move the process `pid` into the one for the pod's helpers. Its children are
        born there, so this comes before the first of them.

        :raises FailedPrecondition: the kernel refuses; nothing is left behind.
        """
        with self._undo.scope():
            for path in filter(None, (self.path, self.overhead_path)):
                new = _in_thread("looking for the cgroup " + path, cgroupfs.missing, path)
                self._entries.append(self._undo.push("cgroup", path=path, new=new))
                _in_thread("making the cgroup " + path, cgroupfs.create, path)
            home = self.overhead_path or self.path
            _in_thread(f"moving process {pid} into the cgroup {home}", cgroupfs.add_process, home, pid)

    def place_vmm(self, pids, vcpu_threads):
        """Move what does the pod's work from the overhead into the pod's cgroup; nothing to do when there is
        no overhead cgroup, for then the VMM was born where it belongs.

        :param pids: of the VMM and its helpers, the VMM first (v2: the VMM moves as a whole).
        :param vcpu_threads: ``{vCPU index: host thread id}`` (v1: only these move).
        :raises FailedPrecondition: the kernel refuses, or they are gone.
        """
        if self.overhead_path is None:
            return
        for thread in vcpu_threads.values():
            _in_thread(f"moving vCPU thread {thread}", cgroupfs.add_thread, self.path, thread)
        for pid in pids[:1]:
            _in_thread(f"moving the VMM {pid}", cgroupfs.add_process, self.path, pid, 2)

    def update_cpuset(self, container_id, cpus="", mems=""):
        """Take note of a container's cpuset, and confine the VM to the union of all containers'.

        :param cpus/mems: in the kernel's list form ("0-3,7"); "" when the container has none, or is gone.
        :raises InvalidArgument: they cannot be read, or the host does not have them.
        """
        wanted = dict(self._cpusets)
        wanted[container_id] = (parse_cpus(cpus), parse_cpus(mems))
        union = [format_cpus(set().union(*(sets[which] for sets in wanted.values()))) for which in (0, 1)]
        if not _in_thread(f"setting the cpuset of {self.path}", cgroupfs.set_cpuset, self.path, *union):
            log.warning("this host has no cpuset controller for %s: the cpuset %r %r of container %s "
                        "is not enforced", self.path, cpus, mems, container_id)
        self._cpusets = wanted

    def metrics(self):
        """What the sandbox uses on the host now: :class:`SandboxFigures`."""
        overhead = None
        if self.overhead_path:
            overhead = _in_thread("reading " + self.overhead_path, cgroupfs.figures, self.overhead_path)
        return SandboxFigures(_in_thread("reading " + self.path, cgroupfs.figures, self.path), overhead)

    def remove(self):
        """Move this process out and remove the cgroups; again does nothing.

        :raises Unavailable: other processes are in them still.
        """
        while self._entries:
            self._entries[-1].release()
            self._entries.pop()


def cgroup_path(cgroups_path):
    """The path in the cgroup file system that a spec's `cgroupsPath` means; "" for an empty one.

    systemd's form ``slice:prefix:name`` becomes the directory that systemd itself would use, and katashim
    makes it there, whether systemd runs or not. Where it does, the scope is no unit of systemd's: it
    inherits the limits of the slice, and `systemctl` does not list it.

    :raises InvalidArgument: it leads upwards, or the slice's name is impossible.
    """
    if not _is_systemd(cgroups_path):
        return cgroupfs.check_path(cgroups_path)
    parent, prefix, name = cgroups_path.split(":")
    unit = name if name.endswith(".slice") else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    if "/" in cgroups_path or not name:
        raise InvalidArgument(f"the cgroup path {cgroups_path!r} is not of the form slice:prefix:name")
    return cgroupfs.check_path(f"{_slice_path(parent or 'system.slice')}/{unit}")


def _is_systemd(cgroups_path):
    return cgroups_path.count(":") == 2


def _slice_path(name):
    """"a-b.slice" lies in "a.slice": the dashes in a slice's name spell its parents (systemd.slice(5))."""
    stem = name.removesuffix(".slice")
    if stem == name or stem != "-" and ("" in stem.split("-")):
        raise InvalidArgument(f"{name!r} is not the name of a systemd slice")
    if stem == "-":
        return ""
    parts = stem.split("-")
    return "/".join("-".join(parts[:count + 1]) + ".slice" for count in range(len(parts)))


def parse_cpus(text):
    """The kernel's list form ("0-3,7") as a set of ints. :raises InvalidArgument: it is none."""
    numbers = set()
    for part in text.split(",") if text.strip() else ():
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError as exc:
            raise InvalidArgument(f"{text!r} is not a list of CPUs or memory nodes") from exc
        if not 0 <= low <= high <= _MAX_CPU:
            raise InvalidArgument(f"{text!r} is not a list of CPUs or memory nodes")
        numbers.update(range(low, high + 1))
    return numbers


def format_cpus(numbers):
    """A set of ints in the kernel's list form."""
    ranges = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def _in_thread(what, function, *args):
    from katashim.green import in_thread  # `delete` uses this module's remove_path without gevent
    return in_thread(function, *args, what=what)
