"""Fixtures of the shim's tests: short socket directories, and shims that are ended whatever happens."""

import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest

from katashim import child

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = os.path.join(ROOT, "bin", "containerd-shim-katashim-v2")


@pytest.fixture
def socket_dir():
    """A directory with a path so short that a shim's socket fits (pytest's own are too long)."""
    path = tempfile.mkdtemp(prefix="ks-", dir="/tmp")
    yield path
    shutil.rmtree(path)


class Shims:
    """Runs the shim's program as containerd does, and ends the daemons it leaves behind.

    :ivar socket_dir: where the sockets are.
    """

    def __init__(self, root, socket_dir):
        self.socket_dir = socket_dir
        self._root = root
        self._daemons = []

    def bundle(self, name, annotations=None, config=None):
        """Make a bundle directory as containerd prepares it; returns its path."""
        path = os.path.join(self._root, name)
        os.mkdir(path)
        os.mkfifo(os.path.join(path, "log"))
        with open(os.path.join(path, "config.json"), "w") as file:
            file.write(config if config is not None else json.dumps({"annotations": annotations or {}}))
        return path

    def run(self, bundle, *words, stdin=b"", environment=None):
        """Run the program in `bundle` with `words`; returns the subprocess.CompletedProcess."""
        env = {"PATH": os.environ["PATH"], "KATASHIM_SOCKET_DIR": self.socket_dir,
               "KATASHIM_PYTHON": sys.executable, **(environment or {})}
        env = {key: value for key, value in env.items() if value is not None}
        done = subprocess.run([PROGRAM, *words], cwd=bundle, env=env, input=stdin, capture_output=True,
                              timeout=30, check=False)
        pid = self.daemon_pid(bundle)
        if pid is not None:
            self._daemons.append((pid, child.start_time(pid)))
        return done

    def start(self, container_id, bundle, **options):
        """The verb start for `container_id`, with the flags that containerd gives."""
        return self.run(bundle, *flags_for(container_id), "start", **options)

    def delete(self, container_id, bundle, **options):
        """The verb delete."""
        return self.run(bundle, *flags_for(container_id), "-bundle", bundle, "delete", **options)

    def daemon_pid(self, bundle):
        """The pid that start recorded in the bundle, or None."""
        try:
            with open(os.path.join(bundle, "shim.pid")) as file:
                return int(file.read())
        except FileNotFoundError:
            return None

    def sockets(self):
        """Paths of all sockets there are."""
        return sorted(os.path.join(self.socket_dir, name) for name in os.listdir(self.socket_dir))

    def kill(self):
        """End all daemons."""
        for pid, started in self._daemons:
            if started is not None:
                child.kill_identity(pid, started)


def flags_for(container_id):
    return ["-namespace", "k8s.io", "-address", "/run/c.sock", "-publish-binary", "/bin/containerd",
            "-id", container_id]


@pytest.fixture
def shims(tmp_path, socket_dir):
    made = Shims(str(tmp_path), socket_dir)
    yield made
    made.kill()
