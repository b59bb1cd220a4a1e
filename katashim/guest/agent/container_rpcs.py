"""The RPCs of containers and processes: what belongs to the wire. Called by services.py.

Codes and words of errors are upstream's, with all their differences from call to call: hosts look at them.
"""

import threading

from katashim.guest.agent import counters, rpcerror
from katashim.guest.agent.rpcerror import RpcError
from katashim.guest.agent.rpcs import Rpcs
from katashim.guest.agent.server import Answer


class ContainerRpcs(Rpcs):
    def CreateContainer(self, request):
        _verify_id(request.container_id)
        if request.OCI is None:
            raise RpcError(rpcerror.INTERNAL, "EINVAL: Invalid argument")
        if request.shared_mounts:
            raise RpcError(rpcerror.UNIMPLEMENTED, "shared_mounts are not supported by this agent")
        _refuse_passed_descriptors(request)
        self.sandbox.create_container(request)

    def StartContainer(self, request):
        self.sandbox.start_container(request.container_id)

    def RemoveContainer(self, request):
        if not request.timeout:
            self.sandbox.remove_container(request.container_id)
            return
        self.sandbox.container(request.container_id)        # an unknown one is not worth a thread
        self._remove_within(request.container_id, request.timeout)

    def _remove_within(self, cid, timeout_s):
        """As upstream: after `timeout_s` the caller is told so, and the removal goes on."""
        failure = []

        def remove():
            try:
                self.sandbox.remove_container(cid)
            except Exception as exc:  # noqa: BLE001  it is raised in the caller's thread
                failure.append(exc)

        thread = threading.Thread(target=remove, name=f"remove {cid}", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            raise RpcError(rpcerror.INTERNAL, "ETIME: Timer expired")
        if failure:
            raise failure[0]

    def StatsContainer(self, request):
        container = self.sandbox.container(request.container_id, _quoted_invalid_id)
        if container.cgroup is None:
            return self.make("grpc.StatsContainerResponse")
        return self.make("grpc.StatsContainerResponse",
                         cgroup_stats=counters.read(container.cgroup, self.make))

    def UpdateContainer(self, request):
        container = self.sandbox.container(request.container_id, _quoted_invalid_id)
        if request.resources is not None:
            container.update(request.resources)

    def PauseContainer(self, request):
        self.sandbox.container(request.container_id, _quoted_invalid_id).pause()

    def ResumeContainer(self, request):
        self.sandbox.container(request.container_id, _quoted_invalid_id).resume()


class ProcessRpcs(Rpcs):
    def ExecProcess(self, request):
        container = self.sandbox.container(request.container_id)
        if request.process is None:
            raise RpcError(rpcerror.INTERNAL, "Unable to parse process from ExecProcessRequest")
        _refuse_passed_descriptors(request)
        container.execute(request.exec_id, request.process, self.sandbox.settings.container_pipe_size)

    def SignalProcess(self, request):
        self._container(request).signal(request.exec_id, request.signal)

    def WaitProcess(self, request):
        container = self._container(request)
        process = container.process(request.exec_id)
        status = process.end.wait()
        return Answer(self.make("grpc.WaitProcessResponse", status=status),
                      container.forget(request.exec_id, process))

    def ReadStdout(self, request):
        return self.make("grpc.ReadStreamResponse", data=self._process(request).read_stdout(request.len))

    def ReadStderr(self, request):
        return self.make("grpc.ReadStreamResponse", data=self._process(request).read_stderr(request.len))

    def WriteStdin(self, request):
        try:
            process = self._process(request)
        except RpcError as exc:
            raise RpcError(rpcerror.INTERNAL, _STDIN_WORDS[exc.text]) from exc
        return self.make("grpc.WriteStreamResponse", len=process.write_stdin(request.data))

    def CloseStdin(self, request):
        self._process(request).stdio.close_stdin()

    def TtyWinResize(self, request):
        self._process(request).resize(request.row, request.column)

    def _container(self, request):
        return self.sandbox.container(
            request.container_id, lambda: RpcError(rpcerror.INVALID_ARGUMENT, "InvalidContainerId"))

    def _process(self, request):
        return self._container(request).process(request.exec_id)


# How upstream's WriteStdin names what the other calls name differently.
_STDIN_WORDS = {"InvalidContainerId": "Invalid container id",
                "InitProcessNotFound": "Process not found: init process missing",
                "InvalidExecId": "Process not found: invalid exec id"}


def _quoted_invalid_id():
    return RpcError(rpcerror.INVALID_ARGUMENT, '"invalid container id"')


def _refuse_passed_descriptors(request):
    """stdio by a vsock connection for each stream is Dragonball's; output would be lost in silence."""
    if request.stdin_port or request.stdout_port or request.stderr_port:
        raise RpcError(rpcerror.UNIMPLEMENTED, "stdio by passed descriptors is not supported by this agent")


def _verify_id(cid):
    """Upstream's rule for ids: at least two characters, the first alphanumeric, the others also ``_.-``."""
    if len(cid) < 2 or not cid[0].isalnum() or not all(char.isalnum() or char in "_.-" for char in cid):
        raise RpcError(rpcerror.INTERNAL, f'"Invalid container ID {cid}"')
