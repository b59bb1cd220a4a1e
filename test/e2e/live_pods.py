"""Containers as a CRI runtime groups them, and what stands behind them on the host.

Used by the end-to-end tests beside harness.containerd, which knows of containers only.
"""

import json
import os
import time

import configobj
import gevent
from gevent.socket import AF_UNIX, socket
from harness import image
from harness.containerd import KATASHIM, REPOSITORY

from katashim import child, undo
from katashim.ttrpc import proto
from katashim.ttrpc.client import Client

GUEST = os.environ.get("KATASHIM_GUEST", "/var/lib/katashim/guest")
TASK = "containerd.task.v2.Task"
_GUEST_FILES = {"kernel": "vmlinux", "image": "rootfs.img", "boot_initrd": "initrd.img"}
_CALL_S = 60
FOREVER = ("sleep", "100000")


def configuration(agent=None, runtime=None, **hypervisor):
    """The text of a configuration: the shipped one, with the guest of these tests and some settings."""
    with open(f"{REPOSITORY}/defaults/qemu.conf") as file:
        shipped = configobj.ConfigObj(file.read().split("\n"), interpolation=False)
    guest = {key: f"{GUEST}/{name}" for key, name in _GUEST_FILES.items()}
    shipped["hypervisor"]["qemu"].update({**guest, **hypervisor})
    shipped["agent"]["kata"].update(agent or {})
    shipped["runtime"].update(runtime or {})
    return "\n".join(shipped.write()) + "\n"


def wait_for(look, what, deadline_s=30):
    """What `look` returns, as soon as it is true. :raises AssertionError: it is not in time."""
    end = time.monotonic() + deadline_s
    while not (found := look()):
        assert time.monotonic() < end, f"{what}: not within {deadline_s} s"
        time.sleep(0.01)
    return found


class Pod:
    """A sandbox container, started by entering the ``with`` block, and members beside it.

    :param daemon: harness.containerd.Containerd. :param name: its id. :param options: ctr run's, for it.
    """

    def __init__(self, daemon, name, options=()):
        self.daemon, self.name = daemon, name
        self._options = options

    def __enter__(self):
        self.daemon.run(self.name, *FOREVER, options=["-d", *self._options, *self._marks("sandbox")])
        return self

    def __exit__(self, *error):
        self.daemon.ctr("task", "kill", "-s", "SIGKILL", self.name, check=False)
        self.daemon.ctr("task", "rm", "-f", self.name, check=False)
        self.daemon.ctr("container", "rm", self.name)

    def _marks(self, kind):
        marks = {"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": self.name}
        return [word for key, value in marks.items() for word in ("--annotation", f"{key}={value}")]

    def run(self, name, *command, options=(), **how):
        """``ctr run`` a member; see Containerd.run."""
        return self.daemon.run(name, *command, options=[*options, *self._marks("container")], **how)

    def start_run(self, name, *command, options=(), **how):
        """The same without waiting for its end; see Containerd.start_run."""
        return self.daemon.start_run(name, *command, options=[*options, *self._marks("container")], **how)

    def terminal(self, name, *command, options=(), **size):
        """``ctr run -t`` a member on a terminal."""
        return self.daemon.terminal("run", "--rm", "-t", *options, *self._marks("container"), "--runtime",
                                    KATASHIM, image.NAME, name, *command, **size)


# -- behind it, on the host -------------------------------------------------------------------------
def state(sandbox):
    """The sandbox's state.json, a dict; None when there is none."""
    try:
        with open(f"/run/kata/{sandbox}/state.json") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def acquired(sandbox, kind):
    """The arguments of all living journal entries of `kind`, such as "process", oldest first."""
    try:
        entries = undo.read(f"/run/kata/{sandbox}/journal")[1]
    except FileNotFoundError:
        return []
    return [args for _, found, args in entries if found == kind]


def pid_of(sandbox, program):
    """The pid of one of a sandbox's processes, by a word of its name; None when there is none (yet)."""
    for args in acquired(sandbox, "process"):
        if program in args["name"] and args.get("pid") and child.is_alive(args["pid"], args["start_time"]):
            return args["pid"]
    return None


def shim_pid(sandbox):
    """The pid of the shim that owns a sandbox; None before it has a directory."""
    try:
        return undo.read(f"/run/kata/{sandbox}/journal")[0].get("pid")
    except FileNotFoundError:
        return None


# -- the shim's own API -----------------------------------------------------------------------------
class TaskApi:
    """The Task service of one shim, called as containerd calls it.

    :param address: of the shim's socket, ``unix:///...``, as it stands in the bundle.
    """

    def __init__(self, address):
        sock = socket(AF_UNIX)
        sock.connect(address.removeprefix("unix://"))
        self._client = Client(sock, "the shim")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._client.close()

    def call(self, method, timeout_s=_CALL_S, **fields):
        """Call `method` with the request's fields; returns the response message."""
        request = proto.build(proto.service(TASK)[method].request, **fields)
        return self._client.call(TASK, method, request, timeout_s)

    def begin(self, method, **fields):
        """The same in a greenlet, which is returned: ``.get()`` is its response."""
        greenlet = gevent.spawn(self.call, method, **fields)
        gevent.sleep(0)                 # it has sent its request when this returns
        return greenlet


def api_of(daemon, container):
    """The :class:`TaskApi` of the shim behind a container of `daemon`'s."""
    with open(f"{daemon.state}/io.containerd.runtime.v2.task/default/{container}/address") as file:
        return TaskApi(file.read().strip())
