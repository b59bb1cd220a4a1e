"""What the tests of the agent ask it for: busybox roots and container specs."""

import contextlib
import itertools
import os
import shutil

BUSYBOX = "/bin/busybox"
_APPLETS = ("sh", "cat", "echo", "sleep", "ls", "id", "env", "pwd", "ps", "kill", "head", "dd", "md5sum",
            "stty", "tty",
            "mount", "touch", "true", "false", "hostname", "ip", "grep", "wc", "mkdir", "yes", "nproc",
            "chmod", "ln")
CAPABILITIES = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_SYS_CHROOT", "CAP_NET_RAW"]
_numbers = itertools.count(1)


def make_root(path):
    """A root filesystem with busybox in the directory `path`."""
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "root", "run"):
        os.makedirs(f"{path}/{name}")
    shutil.copy(BUSYBOX, f"{path}/bin/busybox")
    for name in _APPLETS:
        os.symlink("busybox", f"{path}/bin/{name}")
    with open(f"{path}/etc/passwd", "w") as file:
        file.write("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n")
    return path


def process(*args, **fields):
    """A ``grpc.Process`` as a dict."""
    sets = dict.fromkeys(("Bounding", "Effective", "Permitted"), CAPABILITIES)
    return {"Args": list(args), "Env": ["PATH=/bin:/usr/bin"], "Cwd": "/", "User": {"UID": 0, "GID": 0},
            "Capabilities": sets, **fields}


def spec(root, *args, cgroup="", namespaces=("mount", "ipc", "uts"), linux=None, mounts=(), **fields):
    """A ``grpc.Spec`` as a dict."""
    return {
        "Version": "1.1.0", "Process": process(*args, **fields), "Root": {"Path": root}, "Hostname": "pod",
        "Mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "mode=755", "size=64k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["newinstance", "ptmxmode=0666", "mode=0620"]}, *mounts],
        "Linux": {"CgroupsPath": cgroup, "Namespaces": [{"Type": kind} for kind in namespaces],
                  **(linux or {})}}


class Pod:
    """Calls an agent for containers, and removes those that are left at the end.

    :param client: a PlainClient. :param root: path of a busybox root, as the agent sees it.
    :param storages: what every container needs for that root to be there.
    """

    def __init__(self, client, root, storages=()):
        self.client, self.root, self._storages = client, root, list(storages)
        self._cids = []

    def create(self, *args, storages=(), devices=(), sandbox_pidns=False, **fields):
        """Create a container; returns its id."""
        cid = f"test-{os.getpid()}-{next(_numbers)}"
        fields.setdefault("cgroup", f"/katashim-test/{cid}")
        self.client.call("CreateContainer", container_id=cid,
                         OCI=spec(fields.pop("root", self.root), *args, **fields),
                         storages=[*self._storages, *storages], devices=devices, sandbox_pidns=sandbox_pidns)
        self._cids.append(cid)
        return cid

    def run(self, *args, **fields):
        """Create and start a container; returns its id."""
        cid = self.create(*args, **fields)
        self.client.call("StartContainer", container_id=cid)
        return cid

    def execute(self, cid, *args, exec_id=None, **fields):
        """Start a process in a container; returns its exec id."""
        exec_id = exec_id or f"exec-{next(_numbers)}"
        self.client.call("ExecProcess", container_id=cid, exec_id=exec_id, process=process(*args, **fields))
        return exec_id

    def read(self, cid, exec_id="", stream="Stdout", size=32768):
        """All that a process writes, until the end of the stream."""
        data = bytearray()
        while True:
            piece = self.client.call(f"Read{stream}", container_id=cid, exec_id=exec_id, len=size).data
            if not piece:
                return bytes(data)
            data += piece

    def wait(self, cid, exec_id=""):
        """The exit status of a process."""
        return self.client.call("WaitProcess", container_id=cid, exec_id=exec_id).status

    def output(self, cid, *args, **fields):
        """What a command in a container prints; it must succeed."""
        exec_id = self.execute(cid, *args, **fields)
        text = self.read(cid, exec_id).decode()
        errors = self.read(cid, exec_id, "Stderr").decode()
        status = self.wait(cid, exec_id)
        assert status == 0, f"{args} ended with {status}: {text}{errors}"
        return text

    def remove(self, cid):
        """Remove a container."""
        self._cids.remove(cid)
        self.client.call("RemoveContainer", container_id=cid)

    def remove_all(self):
        """Remove the containers that are still there."""
        from plain_client import Refused
        for cid in self._cids:
            with contextlib.suppress(Refused):
                self.client.call("RemoveContainer", container_id=cid)
        self._cids.clear()
