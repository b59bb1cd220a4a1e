"""The guest's side of CopyFile, over a real ttRPC connection, with the rules of Kata's agent."""

import os
import socket
import stat

from katashim.agent.client import Agent
from katashim.errors import PERMISSION_DENIED, KatashimError
from katashim.ttrpc import proto
from katashim.ttrpc.server import Server

_SHARED = "/run/kata-containers/shared/containers/"


class Refused(KatashimError):
    code = PERMISSION_DENIED


class GuestFiles:
    """Serves grpc.AgentService/CopyFile; what is copied lands below the directory `root`.

    :ivar calls: every request, in order.
    """

    def __init__(self, root):
        self.root, self.calls = str(root), []

    def Check(self, request, context):
        return proto.build(proto.get("grpc.HealthCheckResponse"), status=1)

    def CopyFile(self, request, context):
        self.calls.append(request)
        if not request.path.startswith(_SHARED) or ".." in request.path.split("/"):
            raise Refused(f"{request.path} is outside of the shared directory")
        path = os.path.join(self.root, request.path[len(_SHARED):])
        os.makedirs(os.path.dirname(path), request.dir_mode & 0o777, exist_ok=True)
        if stat.S_ISDIR(request.file_mode):
            os.makedirs(path, exist_ok=True)
            os.chmod(path, request.file_mode & 0o7777)
            os.chown(path, request.uid, request.gid)
        elif stat.S_ISLNK(request.file_mode):
            os.symlink(request.data, path)
        else:
            self._piece(request, path)

    def _piece(self, request, path):
        partial = os.path.splitext(path)[0] + ".tmp"
        if request.offset == 0:
            for old in (path, partial):
                if os.path.lexists(old):
                    os.unlink(old)
        with open(partial, "ab") as file:
            os.pwrite(file.fileno(), request.data, request.offset)
            size = os.fstat(file.fileno()).st_size
        if size == request.file_size:
            os.chmod(partial, request.file_mode & 0o7777)
            os.chown(partial, request.uid, request.gid)
            os.rename(partial, path)

    def path(self, guest_path):
        """Where a guest path lies here."""
        return os.path.join(self.root, guest_path[len(_SHARED):])


class served:
    """``with served(guest_files, socket_path) as agent:`` the agent's client, connected to it."""

    def __init__(self, files, socket_path):
        self._files, self._path = files, str(socket_path)

    def __enter__(self):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._path)
        listener.listen(4)
        self._server = Server(listener, {"grpc.AgentService": self._files, "grpc.Health": self._files})
        self._server.start()
        self._agent = Agent("unix://" + self._path).connect(timeout_s=5)
        return self._agent

    def __exit__(self, *error):
        self._agent.close()
        self._server.stop()
        return False
