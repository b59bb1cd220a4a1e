"""A container in a sandbox: what it holds on the host, its processes, and its verbs.

Verbs that change it (start, delete, pause, ...) take turns on the container's own lock, a FIFO; State
and Wait take no lock. What a container holds (disks, binds, mounts) hangs on an undo stack of its own
inside the sandbox's.
"""

import logging

import gevent
from gevent.lock import BoundedSemaphore

from katashim import oci, state
from katashim.agent import oci as agent_oci
from katashim.errors import (
    NOT_FOUND,
    AgentError,
    AlreadyExists,
    ConnectionClosed,
    FailedPrecondition,
    InvalidArgument,
    KatashimError,
    NotFound,
)
from katashim.resources import block, rootfs, specmut, volume
from katashim.runtime import events
from katashim.runtime.process import CREATED, KILLED, PAUSED, RUNNING, STOPPED, Process

log = logging.getLogger(__name__)

SIGKILL, SIGTERM = 9, 15
_REMOVE_S = 10              # what the agent gets to remove a container
_END_S = 30                 # for the end of a process that was killed in order to be deleted
_EXECS_END_S = 5            # for the ends of execs to be seen after their container was removed


class Container:
    """One container.

    :param sandbox: katashim.runtime.sandbox.Sandbox. :param settings: CreateTask's, see
        katashim.runtime.shim.Create. :param spec: the OCI spec, a dict.
    :ivar init: its first :class:`Process`. :ivar execs: ``{exec id: Process}``.
    :ivar oom_killed: the guest's kernel killed something in it for want of memory.
    """

    def __init__(self, sandbox, settings, spec):
        self.sandbox, self.settings, self.spec = sandbox, settings, spec
        self.id, self.bundle = settings.id, settings.bundle
        self.init = Process(self, "", settings)
        self.execs = {}
        self.oom_killed = False
        self._lock = BoundedSemaphore(1)    # one changing verb at a time
        self._undo = None
        self._in_guest = False              # CreateContainer succeeded, RemoveContainer has not

    def __repr__(self):
        return f"<container {self.id}, {self.init.status}, {len(self.execs)} execs>"

    # -- looking ----------------------------------------------------------------------------------
    def process(self, exec_id):
        """The process `exec_id`, or its first one for "" and for its own id. :raises NotFound:"""
        if not exec_id or exec_id == self.id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise NotFound(f"container {self.id} has no exec {exec_id!r}") from None

    def snapshot(self):
        """Plain data for state.json."""
        return {"id": self.id, "bundle": self.bundle, "status": self.init.status,
                "exit_status": self.init.exit_status, "oom_killed": self.oom_killed,
                "execs": {name: process.status for name, process in self.execs.items()}}

    # -- its life ---------------------------------------------------------------------------------
    def create(self):
        """Bring its root filesystem, volumes and devices into the guest and create it there.

        :raises KatashimError: nothing is left behind, on the host or in the guest.
        """
        with self._lock:
            self._undo = self.sandbox.undo.child(f"container {self.id}")
            try:
                self.init.open_stdio(self.sandbox.namespace)
                self._create_in_guest()
            except BaseException:
                self._withdraw()
                raise
            self.sandbox.publish(events.create(self))
            self.init.attend()

    def _create_in_guest(self):
        sandbox, config = self.sandbox, self.sandbox.config
        means = {"sharefs": sandbox.sharefs, "vm": sandbox.vm, "undo": self._undo}
        root = rootfs.prepare(self.id, self.settings.rootfs, self.bundle, self.spec["root"],
                              use_disks=not config.hypervisor.disable_block_device_use, **means)
        volumes = volume.prepare(self.id, self.spec.get("mounts") or [], sandbox_id=sandbox.id,
                                 agent=sandbox.agent, **means)
        devices = block.devices(self.spec, sandbox.vm, self._undo)
        amended = specmut.amend(
            self.spec, container_type=oci.container_type(self.spec), bundle=self.bundle,
            mounts=volumes.mounts, guest_rootfs=root.guest_path, runtime_config=config.runtime,
            guest_selinux=not config.hypervisor.disable_guest_selinux)
        lost = []
        message = agent_oci.to_proto(amended, lost)
        if lost:
            log.warning("the guest is not told of these parts of the spec of %s: %s", self.id, ", ".join(lost))
        self._set_cpuset(self.spec["linux"].get("resources"))
        self._in_guest = True       # before the call: when its answer is lost, it may be there
        sandbox.agent.CreateContainer(
            container_id=self.id, exec_id=self.id, OCI=message, devices=devices,
            storages=[*root.storages, *volumes.storages],
            sandbox_pidns=specmut.sandbox_pidns(self.spec))

    def start(self):
        """Start it. :raises FailedPrecondition: it has been started already."""
        with self._lock:
            process = self.init
            if process.status != CREATED:
                raise FailedPrecondition(f"container {self.id} cannot be started: it is {process.status}")
            process.announced.clear()
            try:
                self.sandbox.agent.StartContainer(container_id=self.id)
                process.started()
                self.sandbox.publish(events.start(self))
            finally:
                process.announced.set()

    def delete(self):
        """Remove it, in the guest and on the host. One that was never started is killed first.

        :raises FailedPrecondition: it runs. :raises NotFound: another call was faster.
        """
        with self._lock:
            if self._undo is None:
                raise NotFound(f"container {self.id} has been deleted already")
            if self.init.status in (RUNNING, PAUSED):
                raise FailedPrecondition(f"container {self.id} cannot be deleted: it is {self.init.status}")
            if self.init.status == CREATED:
                self._end_unstarted()
            self._withdraw()
        self.sandbox.publish(events.delete(self))

    def _end_unstarted(self):
        self.signal("", SIGKILL, True)
        self.init.exited.wait(_END_S)
        if not self.init.exited.is_set():
            log.warning("container %s did not end within %d s of SIGKILL", self.id, _END_S)

    def _withdraw(self):
        """Give back all that it holds, in the guest first."""
        if self._in_guest:
            self._remove_from_guest()
        self._end_execs()
        for process in (self.init, *self.execs.values()):
            process.close()
        self._set_cpuset(None)
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.finish()

    def _end_execs(self):
        """Those that ran have ended with it in the guest: their last output and their exits are on their way."""
        running = [process for process in self.execs.values() if process.status == RUNNING]
        for process in running:
            process.hurry()
        gevent.wait([process.exited for process in running], timeout=_EXECS_END_S)
        for process in running:
            process.end(KILLED)

    def _remove_from_guest(self):
        try:
            self.sandbox.agent.RemoveContainer(container_id=self.id, timeout=_REMOVE_S)
        except ConnectionClosed:
            log.debug("container %s went with its VM", self.id)
        except KatashimError as exc:
            # An unfinished CreateContainer is what the agent does not know; the rest ends with the VM.
            log.warning("the agent did not remove container %s: %s", self.id, exc)
        self._in_guest = False

    # -- execs ------------------------------------------------------------------------------------
    def add_exec(self, settings, spec):
        """Register an exec (nothing happens in the guest before its start).

        :param settings: id, terminal, stdin, stdout, stderr. :param spec: OCI process, a dict.
        """
        state.check_id(settings.exec_id, "exec id")
        if settings.exec_id in self.execs or settings.exec_id == self.id:
            raise AlreadyExists(f"container {self.id} has an exec {settings.exec_id!r} already")
        if self.init.status == STOPPED:
            raise FailedPrecondition(f"container {self.id} is stopped: nothing can be executed in it")
        if not spec.get("args"):
            raise InvalidArgument(f"exec {settings.exec_id!r} in container {self.id} names no program")
        process = Process(self, settings.exec_id, settings)
        process.spec = spec
        self.execs[settings.exec_id] = process
        self.sandbox.publish(events.exec_added(process))

    def start_exec(self, process):
        """Start an exec. :raises FailedPrecondition: the container does not run, or it was started."""
        if self.init.status != RUNNING:
            raise FailedPrecondition(f"container {self.id} is {self.init.status}: nothing can be executed in it")
        if process.status != CREATED or not process.announced.is_set():
            raise FailedPrecondition(f"exec {process.name} was started already")
        process.announced.clear()
        try:
            process.open_stdio(self.sandbox.namespace)
            self.sandbox.agent.ExecProcess(**process.ids, process=agent_oci.process_to_proto(process.spec))
            if process.exited.is_set():
                raise FailedPrecondition(f"exec {process.name} went with its container while it started")
            process.started()
            self.sandbox.publish(events.exec_started(process))
            process.attend()
        except BaseException:
            process.close()
            raise
        finally:
            process.announced.set()

    def delete_exec(self, process):
        """Forget an exec. :raises FailedPrecondition: it runs."""
        if process.status == RUNNING:
            raise FailedPrecondition(f"exec {process.name} cannot be deleted: it runs")
        process.close()
        self.execs.pop(process.exec_id, None)

    # -- verbs on what runs -----------------------------------------------------------------------
    def signal(self, exec_id, signum, everything):
        """Send a signal to a process, or to all of the container. One that has ended is left in peace
        when the signal would have ended it.

        :raises NotFound: it has ended, and the signal was another.
        """
        process = self.process(exec_id)
        ends_it = signum in (SIGKILL, SIGTERM)
        if process.status == STOPPED:
            if not ends_it:
                raise NotFound(f"process {process.name} has ended already")
            return
        if process.exec_id and process.status == CREATED:
            raise FailedPrecondition(f"exec {process.name} has not been started: there is nothing to signal")
        if signum == SIGKILL:
            process.hurry()
        ids = {"container_id": self.id, "exec_id": ""} if everything and not process.exec_id else process.ids
        try:
            self.sandbox.agent.SignalProcess(**ids, signal=signum)
        except (AgentError, ConnectionClosed) as exc:
            gone = isinstance(exc, ConnectionClosed) or exc.code == NOT_FOUND
            if not gone:
                raise
            if not ends_it:
                raise NotFound(f"process {process.name} has ended already") from exc

    def pause(self):
        """Freeze all its processes."""
        with self._lock:
            if self.init.status != RUNNING:
                raise FailedPrecondition(f"container {self.id} cannot be paused: it is {self.init.status}")
            self.sandbox.agent.PauseContainer(container_id=self.id)
            self._switch(RUNNING, PAUSED, events.paused)

    def resume(self):
        """Let its processes go on."""
        with self._lock:
            if self.init.status != PAUSED:
                raise FailedPrecondition(f"container {self.id} cannot be resumed: it is {self.init.status}")
            self.sandbox.agent.ResumeContainer(container_id=self.id)
            self._switch(PAUSED, RUNNING, events.resumed)

    def _switch(self, before, after, event):
        """The agent has done it; but the container's end, which may have come meanwhile, is final."""
        if self.init.status != before:
            raise FailedPrecondition(f"container {self.id} has ended meanwhile")
        self.init.status = after
        self.sandbox.publish(event(self))

    def update(self, resources):
        """Change its limits. :param resources: OCI LinuxResources, a dict."""
        with self._lock:
            if self.init.status == STOPPED:
                raise FailedPrecondition(f"container {self.id} is stopped: its limits cannot be changed")
            message = agent_oci.resources_to_proto(specmut.guest_resources(resources))
            wanted = {**(self.spec["linux"].get("resources") or {}), **resources}
            self._set_cpuset(wanted)        # before it is kept: what the host refuses must not stick
            self.spec["linux"]["resources"] = wanted
            self.sandbox.agent.UpdateContainer(container_id=self.id, resources=message)

    def stats(self):
        """Its figures, ``grpc.StatsContainerResponse``."""
        if self.init.status == STOPPED:
            raise FailedPrecondition(f"container {self.id} is stopped: it has no figures")
        return self.sandbox.agent.StatsContainer(container_id=self.id)

    def _set_cpuset(self, resources):
        cpu = (resources or {}).get("cpu") or {}
        self.sandbox.cgroup.update_cpuset(self.id, cpu.get("cpus") or "", cpu.get("mems") or "")

    # -- what happens to it -----------------------------------------------------------------------
    def process_ended(self, process):
        """A process of it has ended: tell containerd; its execs end with its first one."""
        self.sandbox.publish(events.exit(process))
        if process is self.init:
            self.sandbox.record()

    def out_of_memory(self):
        """The guest's kernel killed something in it."""
        self.oom_killed = True
        self.sandbox.publish(events.oom(self))
