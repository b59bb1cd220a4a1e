"""A fake Kata agent: the real protocol over the real wire, with processes of the host as containers.

What it says and when follows Kata's agent (its rpc.rs): which error code for which mistake, reads that
end half a second after the process, a WaitProcess that makes it forget the process, GetOOMEvent as a
long poll. What it does not do is isolate: a container's program runs as it is, in the pid namespace of
the fake VMM (test/fakes/vmm.py), and dies with it.
"""

import logging
import os
import shutil
import signal

import gevent
from gevent.event import Event
from gevent.queue import Queue
from guest_process import GuestProcess

from katashim import errors
from katashim.ttrpc import proto

log = logging.getLogger(__name__)

CREATED, RUNNING, PAUSED = "created", "running", "paused"


def refusal(code, text):
    """An error status with the agent's own code and words."""
    error = errors.KatashimError(text)
    error.code = code
    return error


def _unknown_container(code=errors.INTERNAL, text="Invalid container id"):
    return refusal(code, text)


class Container:
    """A container: its first process, its execs, and what the host last asked of it."""

    def __init__(self, init, spec):
        self.init, self.spec = init, spec
        self.status = CREATED
        self.execs = {}
        self.resources = None


class FakeAgent:
    """Handlers of grpc.AgentService and grpc.Health.

    :param end: called, once the answer is on its way, when the host has asked to end the sandbox.
    :ivar containers: ``{id: Container}``. :ivar calls: names of the RPCs so far, in order.
    :ivar files: ``{path: bytes}`` of CopyFile.
    """

    def __init__(self, end):
        self._end = end
        self.containers, self.files = {}, {}
        self.calls = []
        self.sandbox = None             # the CreateSandboxRequest
        self._destroyed = False
        self._ooms = Queue()

    def out_of_memory(self, container_id):
        """The guest's kernel has killed something in a container."""
        self._ooms.put(container_id)

    # -- grpc.Health ------------------------------------------------------------------------------
    def Check(self, request, context):
        return proto.get("grpc.HealthCheckResponse")(status=1)

    def Version(self, request, context):
        return proto.get("grpc.VersionCheckResponse")(grpc_version="0.0.1", agent_version="4.1.0-fake")

    # -- the sandbox ------------------------------------------------------------------------------
    def CreateSandbox(self, request, context):
        self.sandbox = request

    def DestroySandbox(self, request, context):
        if self._destroyed:
            raise refusal(errors.INTERNAL, '"failed to get sandbox sender channel"')
        self._destroyed = True
        for container_id in list(self.containers):
            self._remove(container_id)
        self._ooms.put(None)
        self._end()

    def GetGuestDetails(self, request, context):
        return proto.build(proto.get("grpc.GuestDetailsResponse"), mem_block_size_bytes=128 << 20,
                           agent_details={"version": "4.1.0-fake", "init_daemon": True})

    def GetOOMEvent(self, request, context):
        container_id = None if self._destroyed else self._ooms.get()
        if container_id is None:
            self._ooms.put(None)        # for the next who asks
            raise refusal(errors.INTERNAL, '""')
        return proto.get("grpc.OOMEvent")(container_id=container_id)

    def UpdateInterface(self, request, context):
        return request.interface

    def UpdateRoutes(self, request, context):
        return request.routes

    def AddARPNeighbors(self, request, context):
        """The guest's neighbours are nobody's business here."""

    def CopyFile(self, request, context):
        self.files[request.path] = self.files.get(request.path, b"")[:request.offset] + request.data

    # -- containers -------------------------------------------------------------------------------
    def CreateContainer(self, request, context):
        container_id = request.container_id
        if container_id in self.containers:
            raise refusal(errors.INTERNAL, f"container {container_id} exists")
        if self.sandbox is None:
            raise refusal(errors.INTERNAL, "there is no sandbox yet")
        self.containers[container_id] = None        # taken
        try:
            self.containers[container_id] = Container(_process(request.OCI.Process, held=True), request.OCI)
        finally:
            if self.containers[container_id] is None:
                del self.containers[container_id]

    def StartContainer(self, request, context):
        container = self._container(request)
        if container.status != CREATED or container.init is None:
            raise refusal(errors.INTERNAL, f"container {request.container_id} is not created")
        container.status = RUNNING
        container.init.release()

    def RemoveContainer(self, request, context):
        self._container(request)
        self._remove(request.container_id)

    def _remove(self, container_id):
        container = self.containers.pop(container_id)
        if container is not None:
            for process in _processes(container):
                process.kill_group(signal.SIGKILL)
                process.forget()

    def PauseContainer(self, request, context):
        container = self._container(request, errors.INVALID_ARGUMENT)
        if container.status == PAUSED:
            raise refusal(errors.INTERNAL, "failed to pause container, current status is: Paused")
        container.status = PAUSED
        for process in _processes(container):
            process.kill_group(signal.SIGSTOP)

    def ResumeContainer(self, request, context):
        container = self._container(request, errors.INVALID_ARGUMENT)
        if container.status != PAUSED:
            raise refusal(errors.INTERNAL, f"container status is: {container.status}, not paused")
        container.status = RUNNING
        for process in _processes(container):
            process.kill_group(signal.SIGCONT)

    def UpdateContainer(self, request, context):
        self._container(request, errors.INVALID_ARGUMENT).resources = request.resources

    def StatsContainer(self, request, context):
        container = self._container(request, errors.INVALID_ARGUMENT)
        alive = sum(not process.exited.is_set() for process in _processes(container))
        return proto.build(
            proto.get("grpc.StatsContainerResponse"),
            cgroup_stats={"pids_stats": {"current": alive, "limit": 0},
                          "cpu_stats": {"cpu_usage": {"total_usage": 5_000_000}},
                          "memory_stats": {"usage": {"usage": 4096, "limit": 1 << 30},
                                           "stats": {"anon": 4096, "pgfault": 7}}})

    # -- processes --------------------------------------------------------------------------------
    def ExecProcess(self, request, context):
        container = self._container(request)
        if request.exec_id in container.execs:
            raise refusal(errors.INTERNAL, f"exec_id '{request.exec_id}' already exists")
        container.execs[request.exec_id] = None
        try:
            container.execs[request.exec_id] = _process(request.process, held=False)
        finally:
            if container.execs[request.exec_id] is None:
                del container.execs[request.exec_id]

    def SignalProcess(self, request, context):
        container = self._container(request, errors.INVALID_ARGUMENT, "InvalidContainerId")
        if request.exec_id == "" and request.signal == signal.SIGKILL:
            for process in _processes(container):
                process.kill_group(signal.SIGKILL)
            return
        process = self._process(request)
        number = request.signal
        if process is container.init and number == signal.SIGTERM and not process.minds(number):
            number = signal.SIGKILL
        process.kill(number)

    def WaitProcess(self, request, context):
        process = self._process(request)
        process.exited.wait()
        container = self.containers.get(request.container_id)
        if container is not None:
            if container.init is process:
                container.init = None
            else:
                container.execs.pop(request.exec_id, None)
        process.forget()
        return proto.get("grpc.WaitProcessResponse")(status=process.status)

    def ReadStdout(self, request, context):
        return _read(self._process(request).stdout, request.len)

    def ReadStderr(self, request, context):
        return _read(self._process(request).stderr, request.len)

    def WriteStdin(self, request, context):
        if request.container_id not in self.containers:
            raise _unknown_container()
        process = self._find(request)
        if process is None:
            raise refusal(errors.INTERNAL, "Process not found: init process missing")
        if not request.data:
            process.close_stdin()
        else:
            process.write_stdin(request.data)
        return proto.get("grpc.WriteStreamResponse")(len=len(request.data))

    def CloseStdin(self, request, context):
        self._process(request).close_stdin()

    def TtyWinResize(self, request, context):
        process = self._process(request)
        if not process.terminal:
            raise refusal(errors.UNAVAILABLE, '"no tty"')
        process.resize(request.row, request.column)

    # -- who is meant -----------------------------------------------------------------------------
    def _container(self, request, code=errors.INTERNAL, text=None):
        container = self.containers.get(request.container_id)
        if container is None:
            raise _unknown_container(code, text or "Invalid container id")
        return container

    def _find(self, request):
        container = self.containers[request.container_id]
        if request.exec_id in ("", request.container_id):
            return container.init
        return container.execs.get(request.exec_id)

    def _process(self, request):
        self._container(request, errors.INVALID_ARGUMENT, "InvalidContainerId")
        process = self._find(request)
        if process is None:
            first = request.exec_id in ("", request.container_id)
            raise refusal(errors.NOT_FOUND, "InitProcessNotFound" if first else "InvalidExecId")
        return process


def _processes(container):
    return [process for process in (container.init, *container.execs.values()) if process is not None]


def _process(spec, held):
    """Start the program of a grpc.Process; the agent's own words when there is none of that name."""
    environment = dict(word.partition("=")[::2] for word in spec.Env)
    program = shutil.which(spec.Args[0], path=environment.get("PATH", os.defpath))
    if program is None:
        raise refusal(errors.INTERNAL, f"the file {spec.Args[0]} was not found")
    directory = spec.Cwd if os.path.isdir(spec.Cwd) else "/"
    return GuestProcess([program, *spec.Args[1:]], environment, directory, spec.Terminal, held)


def _read(stream, size):
    if stream is None:
        raise refusal(errors.INTERNAL, "cannot get stream reader")
    return proto.get("grpc.ReadStreamResponse")(data=stream.read(size))


class Faulty:
    """`agent`, with faults put between it and the wire.

    :param die: called for the fault "die". :param hang_up: called for "hangup".

    A fault is ``METHOD=ACTION`` or ``METHOD=ACTION:ARGUMENT``; METHOD is an RPC's name. Actions:
    ``die`` (the VMM is gone at once), ``hang`` (never answered), ``mute`` (done, never answered),
    ``refuse:CODE`` (an error status), ``delay:SECONDS``, ``late:SECONDS`` (done at once, answered then),
    ``hangup`` (all connections are closed), ``hold`` (done when the fault is taken away),
    ``latch`` (done at once, answered then).
    """

    def __init__(self, agent, faults, die, hang_up):
        self._agent, self._die, self._hang_up = agent, die, hang_up
        self._faults = {}
        self._held = {}                 # method -> Event
        self.add(faults)

    def add(self, faults):
        """Add faults: comma-separated, see above. ``METHOD=`` takes one away."""
        for fault in filter(None, faults.split(",")):
            method, _, action = fault.partition("=")
            self._faults[method] = action
            if action in ("hold", "latch"):
                self._held[method] = Event()
            elif method in self._held:
                self._held.pop(method).set()

    def __getattr__(self, name):
        handler = getattr(self._agent, name)

        def handle(request, context):
            self._agent.calls.append(name)
            action, _, argument = self._faults.get(name, "").partition(":")
            self._before(action, argument, name)
            answer = handler(request, context)
            if action == "mute":
                Event().wait()
            elif action == "latch":
                self._wait_for_release(name)
            elif action == "late":
                gevent.sleep(float(argument))
            return answer
        return handle

    def _wait_for_release(self, name):
        if name in self._held:          # else the fault was taken away meanwhile
            self._held[name].wait()

    def _before(self, action, argument, name):
        if action == "die":
            self._die()
        elif action == "hang":
            Event().wait()
        elif action == "refuse":
            raise refusal(int(argument), f"{name} is refused, as was ordered")
        elif action == "hold":
            self._wait_for_release(name)
        elif action == "delay":
            gevent.sleep(float(argument))
        elif action == "hangup":
            self._hang_up()
