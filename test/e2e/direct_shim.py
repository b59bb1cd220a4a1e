"""A shim without containerd: started, called and deleted by a test that plays containerd's part.

For what containerd and ctr never say: broken bundles, calls at the wrong moment, disk images as root.
"""

import contextlib
import json
import os
import shutil
import subprocess

from harness import image
from harness.containerd import REPOSITORY
from live_pods import TaskApi

from katashim import child
from katashim.errors import KatashimError, Unavailable

PROGRAM = os.path.join(REPOSITORY, "bin", "containerd-shim-katashim-v2")
PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"
_VERB_S = 30
_END_S = 20

_MOUNTS = (
    ("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    ("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620")),
    ("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777", "size=65536k")),
    ("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
)


def spec(*command, root="rootfs", annotations=None, **process):
    """An OCI spec of a container that runs `command`. :param process: fields over those of ``process``."""
    return {
        "ociVersion": "1.0.2",
        "process": {"args": list(command), "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
                    "noNewPrivileges": True, **process},
        "root": {"path": root},
        "mounts": [{"destination": destination, "type": kind, "source": source, "options": list(options)}
                   for destination, kind, source, options in _MOUNTS],
        "annotations": annotations or {},
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
                  "resources": {}},
    }


def packed(process):
    """A process for Exec, a dict, as containerd packs it."""
    return {"type_url": PROCESS_TYPE, "value": json.dumps(process).encode()}


def make_root(path):
    """Put a busybox root filesystem into a new directory; returns `path`."""
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
        os.makedirs(f"{path}/{name}")
    program = image.busybox()
    shutil.copy(program, f"{path}/bin/busybox")
    applets = subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout
    for applet in applets.split():
        if applet != "busybox":
            os.symlink("busybox", f"{path}/bin/{applet}")
    return path


class DirectShim:
    """A shim for one sandbox, with its bundle below `directory`.

    :param name: the sandbox's and its first container's id. :param spec: config.json: a dict, text, or
        None for no such file. :param env: for the shim.
    :ivar api: a :class:`live_pods.TaskApi`, once it is started.
    """

    def __init__(self, directory, name, spec, env):
        self.name, self.env = name, env
        self.bundle = os.path.join(directory, name)
        self.api = None
        self._identity = None
        self.write_bundle(self.bundle, spec)

    def write_bundle(self, path, spec):
        """Make a bundle directory, for a further container of the pod; returns `path`."""
        os.makedirs(f"{path}/rootfs")
        if spec is not None:
            with open(f"{path}/config.json", "w") as file:
                file.write(spec if isinstance(spec, str) else json.dumps(spec))
        return path

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        """As containerd does: Shutdown; when the shim is gone, or stays, ``delete`` and SIGKILL."""
        try:
            if self.api is not None:
                self._shut_down()
        finally:
            self.end()
            self.verb("delete")

    def _shut_down(self):
        with self.api:
            with contextlib.suppress(KatashimError):    # it is in whatever state the test left it
                self.api.call("Kill", id=self.name, signal=9, timeout_s=10)
                self.api.call("Wait", id=self.name, timeout_s=10)
                self.api.call("Delete", id=self.name)
            with contextlib.suppress(Unavailable):      # it may have ended already
                self.api.call("Shutdown", id=self.name, now=True)

    def verb(self, name, check=True, timeout_s=_VERB_S):
        """Execute the shim's program; returns subprocess.CompletedProcess with text."""
        words = ["-namespace", "e2e", "-address", "/run/no/containerd.sock", "-publish-binary", "/bin/false",
                 "-id", self.name, *(("-bundle", self.bundle) if name == "delete" else ()), name]
        done = subprocess.run([PROGRAM, *words], cwd=self.bundle, env=self.env, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=timeout_s, check=False)
        assert not check or done.returncode == 0, done
        return done

    def start(self):
        """The verb start, and a connection to what it printed."""
        address = self.verb("start").stdout.decode()
        with open(f"{self.bundle}/shim.pid") as file:
            self.pid = int(file.read())
        self._identity = self.pid, child.start_time(self.pid)
        self.api = TaskApi(address)

    def create(self, container=None, **fields):
        """Create (the sandbox's own container, unless another is named); returns the response."""
        container = container or self.name
        return self.api.call("Create", id=container, **{"bundle": self.bundle, **fields})

    def gone(self):
        """Whether the shim has ended."""
        return not child.is_alive(*self._identity)

    def end(self):
        """Wait for its end; SIGKILL when it takes too long."""
        if self._identity is not None and not child.wait_gone(*self._identity, _END_S):
            child.kill_identity(*self._identity)
            raise AssertionError(f"the shim {self.pid} did not end within {_END_S} s of Shutdown")


def exec_request(*command, **process):
    """The fields of Exec for a `command`."""
    return {"spec": packed({"args": list(command), "cwd": "/", "env": ["PATH=/bin"],
                            "user": {"uid": 0, "gid": 0}, **process})}
