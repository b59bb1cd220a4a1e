"""containerd's Task service, v2 and v3 (their messages are the same): translation and nothing else.

Each RPC becomes one call on katashim.runtime.shim and comes back as one message. Errors are raised by
the layers below and become gRPC codes in the ttRPC server.

Source: containerd's api/runtime/task/v2 and v3, and what its clients make of each answer.
"""

import functools
import json
import os

from katashim import VERSION, host, log
from katashim.errors import FailedPrecondition, InvalidArgument, Unsupported
from katashim.runtime import process as processes
from katashim.runtime.shim import Create, Exec
from katashim.services import stats
from katashim.ttrpc import proto

_OPTIONS = "runtimeoptions.v1.Options"
_STATUS = {processes.CREATED: 1, processes.RUNNING: 2, processes.STOPPED: 3, processes.PAUSED: 4}
_MAX_SIGNAL = 64


def _message(name):
    return proto.get(f"containerd.task.v2.{name}")


def _rpc(handler):
    """A handler whose log records carry the ids of the container and the exec that it is about."""
    @functools.wraps(handler)
    def handle(self, request, context):
        with log.context(container=request.id, exec=getattr(request, "exec_id", "")):
            return handler(self, request, context)
    return handle


class TaskService:
    """The handlers. :param shim: katashim.runtime.shim.Shim."""

    def __init__(self, shim):
        self._shim = shim

    # -- life of a task ---------------------------------------------------------------------------
    @_rpc
    def Create(self, request, context):
        if request.checkpoint:
            raise Unsupported("a VM's container cannot be restored from a checkpoint")
        container = self._shim.create(Create(
            id=request.id, bundle=request.bundle, terminal=request.terminal, stdin=request.stdin,
            stdout=request.stdout, stderr=request.stderr, config_path=_config_path(request.options),
            rootfs=tuple({"type": mount.type, "source": mount.source, "target": mount.target,
                          "options": list(mount.options)} for mount in request.rootfs)))
        return self._pid(_message("CreateTaskResponse"), container)

    @_rpc
    def Start(self, request, context):
        process = self._shim.start(request.id, request.exec_id)
        return self._pid(_message("StartResponse"), process.container)

    @_rpc
    def Delete(self, request, context):
        process = self._shim.delete(request.id, request.exec_id)
        return proto.build(_message("DeleteResponse"), pid=process.container.sandbox.pid,
                           exit_status=process.exit_status, exited_at=_stamp(process))

    @_rpc
    def Exec(self, request, context):
        container = self._shim.container(request.id)
        container.add_exec(
            Exec(exec_id=request.exec_id, terminal=request.terminal, stdin=request.stdin,
                 stdout=request.stdout, stderr=request.stderr),
            _json(request.spec, "the exec's process"))

    @_rpc
    def Shutdown(self, request, context):
        self._shim.shutdown(request.id, request.now)

    # -- signals and streams ----------------------------------------------------------------------
    @_rpc
    def Kill(self, request, context):
        if not 0 < request.signal <= _MAX_SIGNAL:
            raise InvalidArgument(f"there is no signal {request.signal}")
        self._shim.container(request.id).signal(request.exec_id, request.signal, request.all)

    @_rpc
    def CloseIO(self, request, context):
        process = self._process(request)
        if request.stdin:
            process.close_stdin()

    @_rpc
    def ResizePty(self, request, context):
        process = self._process(request)
        if not process.settings.terminal:
            raise FailedPrecondition(f"process {process.name} has no terminal")
        process.resize(request.width, request.height)

    @_rpc
    def Pause(self, request, context):
        self._shim.container(request.id).pause()

    @_rpc
    def Resume(self, request, context):
        self._shim.container(request.id).resume()

    @_rpc
    def Update(self, request, context):
        self._shim.container(request.id).update(_json(request.resources, "the new limits"))

    @_rpc
    def Checkpoint(self, request, context):
        raise Unsupported("a VM's container cannot be checkpointed")

    # -- looking ----------------------------------------------------------------------------------
    @_rpc
    def State(self, request, context):
        process = self._process(request)
        container, settings = process.container, process.settings
        return proto.build(
            _message("StateResponse"), id=container.id, bundle=container.bundle,
            pid=container.sandbox.pid, status=_STATUS[process.status], stdin=settings.stdin,
            stdout=settings.stdout, stderr=settings.stderr, terminal=settings.terminal,
            exit_status=process.exit_status, exited_at=_stamp(process), exec_id=process.exec_id)

    @_rpc
    def Wait(self, request, context):
        process = self._process(request)
        process.exited.wait()
        return proto.build(_message("WaitResponse"), exit_status=process.exit_status,
                           exited_at=_stamp(process))

    @_rpc
    def Pids(self, request, context):
        container = self._shim.container(request.id)
        return proto.build(_message("PidsResponse"), processes=[{"pid": container.sandbox.pid}])

    @_rpc
    def Stats(self, request, context):
        figures = self._shim.container(request.id).stats()
        return proto.build(_message("StatsResponse"),
                           stats=proto.pack_any(stats.to_metrics(figures, host.cgroup_mode())))

    @_rpc
    def Connect(self, request, context):
        container = self._shim.container(request.id)
        return proto.build(_message("ConnectResponse"), shim_pid=os.getpid(),
                           task_pid=container.sandbox.pid, version=VERSION)

    # -- helpers ----------------------------------------------------------------------------------
    def _process(self, request):
        return self._shim.container(request.id).process(request.exec_id)

    def _pid(self, message, container):
        return proto.build(message, pid=container.sandbox.pid)


def _stamp(process):
    return proto.timestamp(process.exited_at_ns) if process.exited_at_ns else None


def _json(packed, what):
    """The JSON object inside an Any, as containerd packs runtime-spec structures."""
    try:
        value = json.loads(packed.value)
    except ValueError as exc:
        raise InvalidArgument(f"{what} ({packed.type_url or 'no type'}) is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} is not a JSON object")
    return value


def _config_path(options):
    """ConfigPath of the runtime's options, "" where containerd's configuration has none."""
    if options.type_url.rpartition("/")[2] != _OPTIONS:
        return ""
    return proto.decode(proto.get(_OPTIONS), options.value).config_path
