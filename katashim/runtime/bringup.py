"""How a VM comes up: every step from an empty directory to a guest that takes containers.

The order is Kata's (network before CreateSandbox, share-fs before the VM) with one addition: what
cannot work is found before anything is started. Each step hangs what it acquires on the sandbox's
undo stack; whoever interrupts a bring-up only has to unwind it.
"""

import importlib
import logging
import os
import time

from katashim.agent.client import Agent
from katashim.agent.types import Storage
from katashim.errors import AgentError, DeadlineExceeded, HypervisorError, Unsupported
from katashim.resources import guest_paths
from katashim.resources.cgroup import SandboxCgroup
from katashim.resources.network import Network, check_netns
from katashim.resources.sharefs import ShareFs

log = logging.getLogger(__name__)

# Kata's name of a hypervisor -> module and class of its driver.
DRIVERS = {"qemu": ("katashim.drivers.qemu", "Qemu"), "fake": ("katashim.drivers.fake", "Fake")}

_INTERFACE_TRIES = 10       # the guest may need a moment to see a card (runtime-rs: 10 x 100 ms)
_INTERFACE_WAIT_S = 0.1
_SHM_BYTES = 64 * 1024 * 1024


def driver(name):
    """The driver class for Kata's `name` of a hypervisor. :raises Unsupported: there is none."""
    try:
        module, cls = DRIVERS[name]
    except KeyError:
        raise Unsupported(f"there is no driver for the hypervisor {name!r}; katashim has "
                          + ", ".join(sorted(DRIVERS.keys() - {"fake"}))) from None
    return getattr(importlib.import_module(module), cls)


class Bringup:
    """One bring-up of `sandbox` (katashim.runtime.sandbox.Sandbox), whose attributes it fills."""

    def __init__(self, sandbox):
        self.sandbox = sandbox
        self.config, self.undo, self.timeline = sandbox.config, sandbox.undo, sandbox.timeline

    def run(self):
        """Do it. :raises KatashimError: which step failed, and why."""
        sandbox, config = self.sandbox, self.config
        for warning in config.warnings:
            log.warning("%s", warning)
        with self.timeline.phase("prepare"):
            self._enter_cgroup()
            netns = check_netns(sandbox.spec, sandbox.id, config.runtime, self.undo)
            sandbox.vm = driver(config.hypervisor.name)(
                sandbox.id, sandbox.run_dir, config.hypervisor, self.undo, netns=netns,
                timeline=self.timeline)
            sandbox.vm.prepare()
            nics = self._attach_network(netns)
            self._start_share()
        sandbox.vm.start(config.hypervisor.boot_timeout_s)
        sandbox.watch_vm()
        self._await_agent()
        if config.agent.policy:
            sandbox.agent.SetPolicy(policy=config.agent.policy)     # before anything it may forbid
        with self.timeline.phase("network"):
            self._set_up_network(nics)
        with self.timeline.phase("sandbox"):
            self._create_sandbox()
        sandbox.cgroup.place_vmm(sandbox.vm.pids(), sandbox.vm.vcpu_threads())

    # -- on the host ------------------------------------------------------------------------------
    def _enter_cgroup(self):
        """Before any child is born, so that all of them and their memory are charged to the pod."""
        path = self.sandbox.spec["linux"].get("cgroupsPath")
        self.sandbox.cgroup = SandboxCgroup(self.sandbox.id, path, self.config.runtime, self.undo)
        self.sandbox.cgroup.enter(os.getpid())

    def _attach_network(self, netns):
        sandbox = self.sandbox
        sandbox.network = Network(netns, self.config.runtime, self.config.hypervisor, self.undo)
        return [sandbox.vm.add_device(nic) for nic in sandbox.network.attach()]

    def _start_share(self):
        if self.config.hypervisor.shared_fs in (None, "none"):
            return
        share = ShareFs(self.sandbox.id, self.config.hypervisor, self.undo)
        share.start()
        self.sandbox.sharefs = share
        self.sandbox.vm.add_device(share.device())
        self.sandbox.watch_share()

    # -- in the guest -----------------------------------------------------------------------------
    def _await_agent(self):
        """Two phases: the kernel until the guest's first words, then the agent until it answers."""
        sandbox, config = self.sandbox, self.config
        began_ms, began = self.timeline.now_ms(), time.monotonic()
        settings = config.agent
        timeout_s = max(config.hypervisor.boot_timeout_s, settings.reconnect_timeout_ms / 1000)
        agent = Agent(sandbox.vm.agent_address(), sandbox_id=sandbox.id,
                      request_timeout_s=settings.create_container_timeout)
        try:
            agent.connect(timeout_s, alive=lambda: sandbox.vm.wait(0) is None)
        except DeadlineExceeded as exc:
            raise sandbox.explain(DeadlineExceeded(
                f"the agent of sandbox {sandbox.id} did not answer within {timeout_s:g} s of the VM's "
                f"start ({exc.message}); boot_timeout_s sets how long katashim waits")) from exc
        sandbox.agent = agent
        ended_ms = self.timeline.now_ms()
        spoke_ms = self._first_words_ms(began, began_ms, ended_ms)
        self.timeline.add("kernel", began_ms, spoke_ms)
        self.timeline.add("agent", spoke_ms, ended_ms)

    def _first_words_ms(self, began, began_ms, ended_ms):
        """When the guest's init spoke first on its console; the end where it was silent."""
        spoke = getattr(getattr(self.sandbox.vm, "console", None), "mark_at", None)
        if spoke is None:
            return ended_ms
        return min(max(began_ms + (spoke - began) * 1000, began_ms), ended_ms)

    def _set_up_network(self, nics):
        agent = self.sandbox.agent
        wanted = self.sandbox.network.guest_network({nic.id: nic.guest_address for nic in nics})
        for interface in wanted.interfaces:
            self._update_interface(interface)
        if wanted.neighbors:
            agent.AddARPNeighbors(neighbors={"ARPNeighbors": wanted.neighbors})
        if wanted.routes:
            agent.UpdateRoutes(routes={"Routes": wanted.routes})

    def _update_interface(self, interface):
        import gevent
        for attempt in range(_INTERFACE_TRIES):
            try:
                self.sandbox.agent.UpdateInterface(interface=interface)
                return
            except AgentError as exc:
                if attempt == _INTERFACE_TRIES - 1:
                    raise HypervisorError(f"the guest cannot set up the interface {interface.name} "
                                          f"({interface.hwAddr}): {exc.message}") from exc
                gevent.sleep(_INTERFACE_WAIT_S)

    def _create_sandbox(self):
        sandbox, spec = self.sandbox, self.sandbox.spec
        storages = [sandbox.sharefs.storage()] if sandbox.sharefs else []
        storages.append(Storage(
            driver="ephemeral", source="shm", fstype="tmpfs", mount_point=guest_paths.SHM,
            options=("noexec", "nosuid", "nodev", "mode=1777", f"size={shm_bytes(spec)}")))
        sandbox.agent.CreateSandbox(
            sandbox_id=sandbox.id, hostname=spec.get("hostname") or "", dns=dns(spec), storages=storages,
            sandbox_pidns=False, guest_hook_path=self.config.hypervisor.guest_hook_path or "",
            kernel_modules=[_module(line) for line in self.config.agent.kernel_modules])
        details = sandbox.agent.GetGuestDetails(mem_block_size=True, mem_hotplug_probe=True)
        if details.mem_block_size_bytes:
            sandbox.vm.set_memory_block_mb(details.mem_block_size_bytes >> 20)


def _module(line):
    name, *parameters = line.split()
    return {"name": name, "parameters": parameters}


def dns(spec):
    """The lines of the host's file that the spec mounts at /etc/resolv.conf, [] when there is none."""
    for mount in spec.get("mounts") or ():
        if mount["destination"] == "/etc/resolv.conf":
            try:
                with open(mount.get("source") or "") as file:
                    return [line.rstrip("\n") for line in file]
            except OSError as exc:
                log.warning("the guest gets no DNS: cannot read %s: %s", mount.get("source"), exc)
    return []


def shm_bytes(spec):
    """The size of the pod's /dev/shm: that of the host's mount where the spec binds one."""
    for mount in spec.get("mounts") or ():
        if mount["destination"] == "/dev/shm" and mount.get("type") == "bind" \
                and mount.get("source") not in (None, "/dev/shm"):
            try:
                facts = os.statvfs(mount["source"])
            except OSError:
                continue
            return facts.f_frsize * facts.f_blocks or _SHM_BYTES
    return _SHM_BYTES
