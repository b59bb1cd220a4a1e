"""The RPCs: each is a function from a request to a response, and every one that upstream's agent answers is here.

Called by main.py, which hands the tables to server.py. What an RPC does is in the modules below; here
is only what belongs to the wire.
"""

from katashim.guest.agent import rpcerror
from katashim.guest.agent.rpcerror import RpcError
from katashim.guest.agent.sandbox import Sandbox

API_VERSION, AGENT_VERSION = "0.0.1", "4.1.0"       # of the protocol that we speak, and its release
_SERVING = 1


def handlers(codec, settings, end):
    """``{service: {method: function}}`` for server.Server.

    :param codec: the wire.Codec for responses. :param end: called to end the agent.
    """
    sandbox = Sandbox(settings)
    agent = {}
    for group in (_Pod(codec, sandbox, end), _Containers(codec, sandbox), _Processes(codec, sandbox)):
        agent.update(group.table())
    return {"grpc.AgentService": agent, "grpc.Health": _Health(codec).table()}


class _Group:
    """Some RPCs: every public method whose name starts with a capital is one."""

    def __init__(self, codec):
        self._codec = codec

    def table(self):
        return {name: getattr(self, name) for name in dir(self) if name[0].isupper()}

    def _make(self, name, **fields):
        return self._codec.type(name)(**fields)


class _Health(_Group):
    def Check(self, request):
        return self._make("grpc.HealthCheckResponse", status=_SERVING)

    def Version(self, request):
        return self._make("grpc.VersionCheckResponse", grpc_version=API_VERSION, agent_version=AGENT_VERSION)


class _Pod(_Group):
    def __init__(self, codec, sandbox, end):
        super().__init__(codec)
        self._sandbox, self._end = sandbox, end

    def CreateSandbox(self, request):
        self._sandbox.set_up(request)

    def DestroySandbox(self, request):
        self._sandbox.destroy()
        self._end()

    def GetOOMEvent(self, request):
        return self._make("grpc.OOMEvent", container_id=self._sandbox.next_oom_event())


class _Containers(_Group):
    def __init__(self, codec, sandbox):
        super().__init__(codec)
        self._sandbox = sandbox

    def CreateContainer(self, request):
        _verify_id(request.container_id)
        if request.OCI is None:
            raise RpcError(rpcerror.INTERNAL, "EINVAL: Invalid argument")
        self._sandbox.create_container(request.container_id, request.OCI, request.sandbox_pidns)

    def StartContainer(self, request):
        self._sandbox.start_container(request.container_id)

    def RemoveContainer(self, request):
        self._sandbox.remove_container(request.container_id)

    def UpdateContainer(self, request):
        container = self._sandbox.container(request.container_id, _quoted_invalid_id)
        if request.resources is not None:
            container.update(request.resources)

    def PauseContainer(self, request):
        self._sandbox.container(request.container_id, _quoted_invalid_id).pause()

    def ResumeContainer(self, request):
        self._sandbox.container(request.container_id, _quoted_invalid_id).resume()


class _Processes(_Group):
    def __init__(self, codec, sandbox):
        super().__init__(codec)
        self._sandbox = sandbox

    def ExecProcess(self, request):
        container = self._sandbox.container(request.container_id)
        if request.process is None:
            raise RpcError(rpcerror.INTERNAL, "Unable to parse process from ExecProcessRequest")
        container.execute(request.exec_id, request.process, self._sandbox.settings.container_pipe_size)

    def SignalProcess(self, request):
        self._container(request).signal(request.exec_id, request.signal)

    def WaitProcess(self, request):
        return self._make("grpc.WaitProcessResponse", status=self._container(request).wait(request.exec_id))

    def ReadStdout(self, request):
        return self._make("grpc.ReadStreamResponse", data=self._process(request).read_stdout(request.len))

    def ReadStderr(self, request):
        return self._make("grpc.ReadStreamResponse", data=self._process(request).read_stderr(request.len))

    def WriteStdin(self, request):
        try:
            process = self._process(request)
        except RpcError as exc:
            raise RpcError(rpcerror.INTERNAL, _STDIN_WORDS[exc.text]) from exc
        return self._make("grpc.WriteStreamResponse", len=process.write_stdin(request.data))

    def CloseStdin(self, request):
        self._process(request).stdio.close_stdin()

    def TtyWinResize(self, request):
        self._process(request).resize(request.row, request.column)

    def _container(self, request):
        return self._sandbox.container(
            request.container_id, lambda: RpcError(rpcerror.INVALID_ARGUMENT, "InvalidContainerId"))

    def _process(self, request):
        return self._container(request).process(request.exec_id)


# How upstream's WriteStdin names what the other calls name differently.
_STDIN_WORDS = {"InvalidContainerId": "Invalid container id",
                "InitProcessNotFound": "Process not found: init process missing",
                "InvalidExecId": "Process not found: invalid exec id"}


def _quoted_invalid_id():
    return RpcError(rpcerror.INVALID_ARGUMENT, '"invalid container id"')


def _verify_id(cid):
    """Upstream's rule for ids: at least two characters, the first alphanumeric, the others also ``_.-``."""
    if len(cid) < 2 or not cid[0].isalnum() or not all(char.isalnum() or char in "_.-" for char in cid):
        raise RpcError(rpcerror.INTERNAL, f'"Invalid container ID {cid}"')
