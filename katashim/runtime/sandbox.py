"""A sandbox: one VM with its containers, from the first Create to the last Shutdown.

Its life goes through katashim.runtime.lifecycle; bring-up and teardown are katashim.runtime.bringup.
Reads (State, Pids, Connect, state.json, the debugger) take plain attributes and never wait.
"""

import logging
import os

import gevent
from gevent.lock import BoundedSemaphore

from katashim import green, state, undo
from katashim.errors import (
    AlreadyExists,
    ConnectionClosed,
    FailedPrecondition,
    HypervisorError,
    KatashimError,
    NotFound,
    Unavailable,
)
from katashim.resources import mounts
from katashim.resources.releases import RELEASES
from katashim.runtime import lifecycle
from katashim.runtime.bringup import Bringup
from katashim.runtime.process import KILLED, STOPPED

log = logging.getLogger(__name__)

STOP_S = 60                 # all of a teardown; containerd's own patience is shorter or equal
_VM_STOP_S = 10
_GOODBYE_S = 3              # for the agent to write back and unmount
_END_S = 0.5                # for the VMM's end to be seen when something hung up that ends with it
_ENDS_S = 5                 # for the ends of processes to be seen after the agent was hung up on
_HEALTH_S = 30              # between two health checks
_STRIKES = 3                # failed checks in a row that mean a lost agent


class Sandbox:
    """One VM and its containers.

    :param shim: katashim.runtime.shim.Shim, for its namespace, publisher and timeline.
    :param config: katashim.config.Config, with the VM's size in it.
    :param spec: the OCI spec of the first container; :param bundle: its bundle.
    :ivar containers: ``{id: Container}``. :ivar agent: katashim.agent.client.Agent, None before boot.
    :ivar vm, sharefs, cgroup, network: what it is made of, None before boot (and sharefs without one).
    :ivar pid: the VMM's host pid, 0 before boot; it keeps its last value.
    """

    def __init__(self, shim, config, spec, bundle):
        self.id, self.namespace = shim.id, shim.namespace
        self.config, self.spec, self.bundle = config, spec, bundle
        self.timeline = shim.timeline
        self.publish = lambda event: shim.publisher.publish(*event)
        self.run_dir = state.run_dir(self.id)
        self.containers = {}
        self.agent = self.vm = self.sharefs = self.cgroup = self.network = None
        self.pid = 0
        self.undo = None
        self.life = lifecycle.Lifecycle(self.id, {
            lifecycle.BOOTING: self._boot, lifecycle.STOPPING: self._tear_down})
        self._bringup = None
        self._watchers = []
        self._recording = BoundedSemaphore(1)   # state.json is written by one greenlet at a time

    def __repr__(self):
        return f"<sandbox {self.id}, {self.life.state}, {len(self.containers)} containers>"

    # -- verbs ------------------------------------------------------------------------------------
    def boot(self):
        """Bring the VM up; returns when its agent is ready for containers.

        :raises KatashimError: why it did not come up; everything has been taken down again.
        """
        self.life.post("boot")
        self.life.settled.wait()
        if self.life.state != lifecycle.READY:
            self.life.reached(lifecycle.STOPPED).wait(STOP_S)
            raise self.failure(f"sandbox {self.id} did not come up")

    def stop(self, timeout_s=STOP_S):
        """Take everything down, whatever the state; returns when it is down. Any number of callers.

        :raises DeadlineExceeded: it goes on in the background.
        """
        self.life.post("stop")
        with green.deadline(timeout_s, f"the teardown of sandbox {self.id}"):
            self.life.reached(lifecycle.STOPPED).wait()

    def add(self, container):
        """Create `container` in it and keep it.

        :raises AlreadyExists: it has one of this id. :raises FailedPrecondition: it is not up.
        """
        self.check_ready()
        if container.id in self.containers:
            raise AlreadyExists(f"container {container.id} exists already")
        self.containers[container.id] = container
        try:
            with self.timeline.phase("create"):
                container.create()
        except BaseException as exc:
            del self.containers[container.id]
            if isinstance(exc, KatashimError):
                self.explain(exc)
            raise
        self.record()

    def remove(self, container):
        """Delete `container` and forget it."""
        container.delete()
        self.containers.pop(container.id, None)
        self.record()

    def container(self, container_id):
        """The container `container_id`. :raises NotFound:"""
        try:
            return self.containers[container_id]
        except KeyError:
            raise NotFound(f"sandbox {self.id} has no container {container_id!r}") from None

    # -- facts ------------------------------------------------------------------------------------
    def check_ready(self):
        """:raises FailedPrecondition: it is not up (any more); says why."""
        if self.life.state != lifecycle.READY:
            raise FailedPrecondition(f"sandbox {self.id} is {self.life.state}"
                                     + (f": {self.life.cause}" if self.life.cause else ""))

    def failure(self, what):
        """The error that tells why it is down, with the evidence."""
        cause = self.life.cause
        if isinstance(cause, KatashimError):
            return cause
        return self.explain(Unavailable(f"{what}: {cause}"))

    def explain(self, error):
        """Attach the evidence to an error: the guest's last words and the phases."""
        if self.vm is not None:
            error.attach("guest console", self.vm.console_tail()[-4096:])
        return error.attach("phases", self.timeline.text())

    def record(self):
        """Write state.json, unless the directory is gone already."""
        with self._recording:
            if self.undo is None or self.life.state == lifecycle.STOPPED:
                return
            try:
                state.write(self.run_dir, self.snapshot())
            except KatashimError as exc:
                log.warning("%s", exc)

    def snapshot(self):
        """Everything that state.json tells, plain data."""
        return {
            "sandbox_type": "virt_container", "id": self.id, "namespace": self.namespace,
            "state": self.life.state, "shim_pid": os.getpid(), "bundle": self.bundle,
            "config": {"path": self.config.path, "files": list(self.config.files)},
            "hypervisor": self.vm.describe() if self.vm else None,
            "agent": self.agent.address if self.agent else None,
            "containers": [container.snapshot() for container in list(self.containers.values())],
            "timeline": self.timeline.records(),
        }

    # -- up ---------------------------------------------------------------------------------------
    def _boot(self):
        self._bringup = gevent.getcurrent()
        try:
            self._open_journal()
            Bringup(self).run()
        except (KatashimError, OSError) as exc:
            self.life.post("boot-failed", self.explain(self._cause_of(exc)))
            return
        self._watchers += [
            green.spawn(f"agent of {self.id}", self._watch_agent),
            green.spawn(f"oom of {self.id}", self._watch_oom),
            green.spawn(f"health of {self.id}", self._watch_health)]
        self.life.post("booted")
        self.life.settled.wait()
        self.record()

    def _cause_of(self, error):
        """What to tell of an error of the bring-up; that the agent hung up is no cause when the VM has ended."""
        if isinstance(error, ConnectionClosed) and self.vm is not None:
            end = self.vm.wait(_END_S)
            return error if end is None else self._vm_is_gone(end)
        if isinstance(error, KatashimError):
            return error
        return HypervisorError(f"sandbox {self.id} did not come up: {error}")

    def _vm_is_gone(self, end):
        return HypervisorError(f"the VM of sandbox {self.id} is gone: {self.vm.name} {end.reason}")

    def _open_journal(self):
        """Make the sandbox's directory and its journal; a dead shim's remains are released first."""
        try:
            os.makedirs(self.run_dir, mode=0o700)
        except FileExistsError:
            self._take_over()
        header = {"sandbox": self.id, "namespace": self.namespace, "pid": os.getpid(),
                  "start_time": _start_time()}
        try:
            self.undo = undo.Undo(os.path.join(self.run_dir, "journal"), RELEASES, run=_release, header=header)
        except KatashimError:           # the disk is full; no journal, so nobody else would remove this
            mounts.remove_tree(self.run_dir)
            raise

    def _take_over(self):
        journal = os.path.join(self.run_dir, "journal")
        try:
            header, _ = undo.read(journal)
        except FileNotFoundError:
            return
        from katashim import child
        if header.get("pid") and child.is_alive(header["pid"], header.get("start_time")):
            raise AlreadyExists(f"sandbox {self.id} exists already: the shim {header['pid']} owns it")
        log.warning("releasing what a dead shim (pid %s) left of sandbox %s", header.get("pid"), self.id)
        failed = green.in_thread(undo.replay, journal, RELEASES, timeout_s=30,
                                 what=f"the release of what is left of sandbox {self.id}")
        if failed:
            what, why = failed[0]
            raise FailedPrecondition(f"the remains of an earlier sandbox {self.id} are in the way: "
                                     f"cannot release {what}: {why}")
        os.unlink(journal)

    def watch_vm(self):
        """Wait for the VMM's end from now on, and tell the owner."""
        self.pid = self.vm.pids()[0]
        self._watchers.append(green.spawn(f"VMM of {self.id}", self._watch_vm))

    def watch_share(self):
        """The same for virtiofsd, without which the guest is stuck."""
        self._watchers.append(green.spawn(f"share of {self.id}", self._watch_share))

    # -- what may happen --------------------------------------------------------------------------
    def _watch_vm(self):
        end = self.vm.wait()
        self.life.post("vmm-exited", self.explain(self._vm_is_gone(end)))

    def _watch_share(self):
        self.sharefs.exited.wait()
        # It ends with the VMM, too; that is the better news and is on its way.
        if self.vm.wait(_END_S) is None:
            self.life.post("share-lost", self.sharefs.failure())

    def _watch_agent(self):
        self.agent.closed.wait()
        if self.vm.wait(_END_S) is None:
            self.life.post("agent-lost", self.explain(
                Unavailable(f"the agent of sandbox {self.id} has hung up")))

    def _watch_oom(self):
        while self.life.state == lifecycle.READY or not self.life.settled.is_set():
            try:
                container_id = self.agent.GetOOMEvent().container_id
            except ConnectionClosed:
                return
            except KatashimError as exc:
                log.warning("the agent of sandbox %s reports no out-of-memory events: %s", self.id, exc)
                return
            container = self.containers.get(container_id)
            if container is not None:
                container.out_of_memory()

    def _watch_health(self):
        """Ask the agent now and then; one late answer is no death (a busy host, a throttled guest)."""
        strikes = 0
        timeout_s = self.config.agent.health_check_request_timeout_ms / 1000
        while not self.life.reached(lifecycle.STOPPING).wait(_HEALTH_S):
            try:
                self.agent.Check(timeout_s=timeout_s)
                strikes = 0
            except ConnectionClosed:
                return
            except KatashimError as exc:
                strikes += 1
                log.warning("health check %d of %d failed: %s", strikes, _STRIKES, exc)
                if strikes == _STRIKES:
                    self.life.post("agent-lost", self.explain(exc))
                    return

    # -- down -------------------------------------------------------------------------------------
    def _tear_down(self):
        try:
            self._end_bringup()
            self._say_goodbye()
            self._end_processes()
            self._stop_vm()
            self._release()
        finally:
            self.life.post("torn-down")

    def _end_bringup(self):
        """A stop in the middle of a boot interrupts it where it waits."""
        if self._bringup is not None and not self._bringup.dead:
            self._bringup.kill(timeout=_VM_STOP_S)
        gevent.killall(self._watchers, block=False)

    def _say_goodbye(self):
        """Let the agent stop what runs, write back and unmount; a stock agent ends the VM then."""
        if self.agent is None or self.agent.closed is None or self.agent.closed.is_set():
            return
        running = self._running()
        if running and self.vm.wait(0) is None:
            for process in running:     # before the agent kills and forgets them, for 137 is what they end with
                process.hurry()
            try:
                self.agent.DestroySandbox(timeout_s=_GOODBYE_S)
            except KatashimError as exc:
                log.info("the agent did not end its sandbox in good order: %s", exc)
        self.agent.close()

    def _running(self):
        """All processes that are in the guest and have not ended."""
        return [process for container in list(self.containers.values())
                for process in (container.init, *container.execs.values())
                if process.attended and process.status != STOPPED]

    def _end_processes(self):
        """Every process that is not known to have ended has ended now."""
        if self.agent is not None:
            self.agent.close()
        running = self._running()
        for process in running:
            process.hurry()
        gevent.wait([process.exited for process in running], timeout=_ENDS_S)
        for process in running:
            process.end(KILLED)

    def _stop_vm(self):
        if self.vm is None:
            return
        try:
            self.vm.stop(_VM_STOP_S)
        except (KatashimError, OSError) as exc:
            log.error("the VMM of sandbox %s is not stopped: %s", self.id, exc)

    def _release(self):
        if self.undo is None:
            return
        failed = self.undo.unwind()
        self.undo.close()
        if failed:
            log.error("left for `delete`, in %s: %s", self.run_dir,
                      "; ".join(f"{entry}: {error}" for entry, error in failed))
            return
        with self._recording:
            self.undo = None
            try:
                green.in_thread(mounts.remove_tree, self.run_dir, what=f"removing {self.run_dir}")
            except (KatashimError, OSError) as exc:
                log.error("%s is not removed: %s", self.run_dir, exc)


def _release(function, args, what):
    green.in_thread(lambda: function(**args), what=what, timeout_s=15)


def _start_time():
    from katashim import child
    return child.start_time(os.getpid())

