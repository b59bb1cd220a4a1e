"""A pod on the fake VMM, seen as containerd sees it: bundles, FIFOs, the Task API, the event service.

:class:`Place` is a directory with everything a shim touches inside it. :class:`InProcess` serves a real
Shim and TaskService from the test's own process; :class:`Daemon` has the real program do it.
"""

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zlib

import gevent
import pytest
from gevent.event import Event
from gevent.socket import socket as gevent_socket

from katashim import child, green, state
from katashim.errors import ConnectionClosed, KatashimError
from katashim.resources import cgroupfs
from katashim.runtime.shim import Shim
from katashim.services.events import Publisher
from katashim.services.task import TaskService
from katashim.shim import endpoint
from katashim.ttrpc import proto
from katashim.ttrpc.client import Client
from katashim.ttrpc.server import Server

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PROGRAM = os.path.join(ROOT, "bin", "containerd-shim-katashim-v2")
FAKE_VMM = f"{sys.executable} {os.path.join(HERE, 'vmm.py')}"

TASK = "containerd.task.v2.Task"
EVENTS = "containerd.services.events.ttrpc.v1.Events"
PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"
NAMESPACE = "fake"
WAIT_S = 15

_CONFIG = """
[hypervisor.fake]
kernel = "/dev/null"
image = "/dev/null"
shared_fs = "{shared_fs}"
boot_timeout_s = {boot_timeout_s}
[agent.kata]
create_container_timeout = {agent_timeout_s}
[runtime]
hypervisor_name = "{hypervisor}"
internetworking_model = "none"
disable_new_netns = {without_netns}
"""
_SETTINGS = {"boot_timeout_s": 20, "agent_timeout_s": 20, "shared_fs": "none", "without_netns": "true",
             "hypervisor": "fake"}
_places = itertools.count(1)


class EventLog:
    """containerd's event service: keeps what is published, in order."""

    def __init__(self, path):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        self.seen = []              # (topic, message)
        self._news = Event()
        self._server = Server(listener, {EVENTS: self}, name="shim")
        self._server.start()

    def Forward(self, request, context):
        envelope = request.envelope
        self.seen.append((envelope.topic, proto.unpack_any(envelope.event)))
        self._news.set()
        self._news.clear()

    def of(self, container_id):
        """``["create", "start", "exit e1", ...]`` of a container; exits of execs carry their id."""
        return [_name(topic, message, container_id) for topic, message in self.seen
                if message.container_id == container_id]

    def messages(self, topic, container_id):
        return [message for seen, message in self.seen
                if seen == topic and message.container_id == container_id]

    def wait(self, container_id, name, count=1):
        """Wait until `name` was published `count` times; returns :meth:`of`."""
        with green.deadline(WAIT_S, lambda: f"{name} of {container_id}, seen are {self.of(container_id)}"):
            while self.of(container_id).count(name) < count:
                self._news.wait()
        return self.of(container_id)

    def stop(self):
        self._server.stop()


def _name(topic, message, container_id):
    name = topic.removeprefix("/tasks/")
    exec_id = getattr(message, "exec_id", "") or getattr(message, "id", "")
    return name if exec_id in ("", container_id) else f"{name} {exec_id}"


class Streams:
    """The FIFOs of one process, as containerd's client holds them.

    :ivar stdin, stdout, stderr: their paths, "" for none.
    """

    def __init__(self, directory, stdin=False, terminal=False):
        self.stdin = self.stdout = self.stderr = ""
        self._readers = {}
        self._stdin = None
        os.makedirs(directory, exist_ok=True)
        for name in ["stdout"] + ["stdin"] * stdin + ["stderr"] * (not terminal):
            path = os.path.join(directory, name)
            setattr(self, name, path)
            if not os.path.exists(path):
                os.mkfifo(path)
        for name in ("stdout", "stderr"):
            if getattr(self, name):
                fd = os.open(getattr(self, name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._readers[name] = [fd, bytearray(), Event(), None]

    @classmethod
    def attached_to(cls, others):
        """A second client of the same FIFOs."""
        return cls(os.path.dirname(others.stdout), stdin=bool(others.stdin), terminal=not others.stderr)

    def read(self):
        """Begin to read the outputs."""
        for name, reader in self._readers.items():
            reader[3] = green.spawn(f"reader of {name}", self._read, reader)
        return self

    def open_stdin(self):
        """Begin to write."""
        self._stdin = os.open(self.stdin, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def write(self, data):
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._stdin, rest):]
            except BlockingIOError:
                gevent.socket.wait_write(self._stdin, timeout=WAIT_S)

    def close_stdin(self):
        fd, self._stdin = self._stdin, None
        if fd is not None:
            os.close(fd)

    def output(self, name="stdout"):
        """All of an output, once it has ended."""
        _, data, ended, _ = self._readers[name]
        with green.deadline(WAIT_S, lambda: f"the end of {name} after {bytes(data[-200:])!r}"):
            ended.wait()
        return bytes(data)

    def so_far(self, name="stdout"):
        """What has been read of an output."""
        return bytes(self._readers[name][1])

    def await_text(self, text, name="stdout"):
        """Wait until `text` (bytes) has come."""
        data = self._readers[name][1]
        with green.deadline(WAIT_S, lambda: f"{text!r} in {name}, so far {bytes(data[-200:])!r}"):
            while text not in data:
                gevent.sleep(0.005)

    def detach(self):
        """Go away, as a client that is killed."""
        self.close_stdin()
        for reader in self._readers.values():
            if reader[3] is not None:
                reader[3].kill()
            fd, reader[0] = reader[0], None
            if fd is not None:
                os.close(fd)

    @staticmethod
    def _read(reader):
        fd, data, ended, _ = reader
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        while True:
            try:
                piece = os.read(fd, 1 << 16)
            except BlockingIOError:
                gevent.socket.wait_read(fd)
                continue
            data += piece
            if not piece and poller.poll(0):        # a hang-up: a writer was there, and has gone
                ended.set()
                return
            if not piece:
                gevent.sleep(0.005)


def spec(*command, terminal=False, annotations=None, **linux):
    """An OCI spec. :param linux: fields of ``linux``."""
    return {"ociVersion": "1.0.2",
            "process": {"args": list(command), "cwd": "/", "env": [f"PATH={os.defpath}"],
                        "terminal": terminal, "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"}, "mounts": [], "annotations": annotations or {},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}], **linux}}


def member_of(sandbox_id):
    """The annotations of a pod's further container."""
    return {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": sandbox_id}


def packed(process):
    """A process or resources, a dict, as containerd packs them into an Any."""
    return {"type_url": PROCESS_TYPE, "value": json.dumps(process).encode()}


def refused(pod, code, method, match=".", **fields):
    """Assert that an RPC is refused with `code`, and how."""
    with pytest.raises(KatashimError, match=match) as caught:
        pod.call(method, **fields)
    assert caught.value.code == code, caught.value


def crc(data):
    return zlib.crc32(data)


class Place:
    """A directory for one shim: bundles, FIFOs, sockets, the sandbox's own directory.

    :param settings: over _SETTINGS.
    :ivar sandbox_id: the pod's, and its first container's; nobody else's, for it names a cgroup too.
    """

    def __init__(self, **settings):
        self.sandbox_id = sandbox_id = f"fake-{os.getpid()}-{next(_places)}"
        self.directory = tempfile.mkdtemp(prefix="ks-", dir="/tmp")   # short: sockets are below it
        self.run_root = os.path.join(self.directory, "run")
        self.run_dir = os.path.join(self.run_root, sandbox_id)
        self.events_path = os.path.join(self.directory, "e")
        self.config_path = os.path.join(self.directory, "config.toml")
        self.image = os.path.join(self.directory, "rootfs.img")
        os.mkdir(self.run_root)
        with open(self.config_path, "w") as file:
            file.write(_CONFIG.format(**{**_SETTINGS, **settings}))
        with open(self.image, "wb") as file:
            file.truncate(4096)
        self._numbers = 0

    def bundle(self, container_id, container_spec):
        """Make a bundle; returns its path."""
        path = os.path.join(self.directory, f"bundle-{container_id}")
        os.makedirs(path, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path, delete=False) as file:
            json.dump(container_spec, file)
        os.rename(file.name, os.path.join(path, "config.json"))     # two clients may use one name
        return path

    def streams(self, **options):
        self._numbers += 1
        return Streams(os.path.join(self.directory, f"io{self._numbers}"), **options)

    def environment(self, faults=""):
        return {"KATASHIM_FAKE_VMM": FAKE_VMM, "KATASHIM_FAKE_FAULTS": faults,
                "KATASHIM_RUN_ROOT": self.run_root,
                "KATASHIM_SHARED_ROOT": os.path.join(self.directory, "shared")}

    def remove(self):
        shutil.rmtree(self.directory)


class Pod:
    """What a test does with a shim; :class:`InProcess` and :class:`Daemon` say how there is one.

    :ivar place: the :class:`Place`. :ivar events: the :class:`EventLog`.
    """

    def __init__(self, place):
        self.place, self.id = place, place.sandbox_id
        self.events = EventLog(place.events_path)
        self._client = None
        self._streams = []

    # -- calls ------------------------------------------------------------------------------------
    def call(self, method, timeout_s=WAIT_S, **fields):
        """Call an RPC of the Task service; raises what it answers, by its code."""
        request = proto.build(proto.service(TASK)[method].request, **fields)
        return self._client.call(TASK, method, request, timeout_s)

    def spawn(self, method, **fields):
        """The same in a greenlet; its ``get()`` returns or raises."""
        return gevent.spawn(self.call, method, **fields)

    def streams(self, **options):
        """FIFOs for a process that is about to be created."""
        self._streams.append(self.place.streams(**options))
        return self._streams[-1]

    def reconnect(self):
        """Hang up, and call again."""
        self._client.close()
        self._client = _client(self.socket_path)

    def create(self, container_id, *command, **options):
        """Create a container that runs `command` on the machine itself; returns the response."""
        return self.call("Create", **self.creation(container_id, *command, **options))

    def creation(self, container_id, *command, io=None, terminal=False, annotations=None, rootfs=None, **linux):
        """The fields of a CreateTaskRequest for that; its bundle is made."""
        if annotations is None:
            annotations = {} if container_id == self.id else member_of(self.id)
        bundle = self.place.bundle(container_id, spec(*command, terminal=terminal, annotations=annotations,
                                                      **linux))
        if rootfs is None:
            rootfs = [{"type": "erofs", "source": self.place.image, "options": ["ro"]}]
        options = proto.pack_any(proto.get("runtimeoptions.v1.Options")(config_path=self.place.config_path))
        return {"id": container_id, "bundle": bundle, "rootfs": rootfs, "terminal": terminal,
                "options": options, **_paths(io)}

    def start(self, container_id, *command, **options):
        """Create and start a container."""
        self.create(container_id, *command, **options)
        return self.call("Start", id=container_id)

    def add_exec(self, container_id, exec_id, *command, io=None, terminal=False):
        """Exec, without its start."""
        process = {"args": list(command), "cwd": "/", "env": [f"PATH={os.defpath}"], "terminal": terminal,
                   "user": {"uid": 0, "gid": 0}}
        return self.call("Exec", id=container_id, exec_id=exec_id, terminal=terminal, spec=packed(process),
                         **_paths(io))

    def exec(self, container_id, exec_id, *command, **options):
        """Exec and its start."""
        self.add_exec(container_id, exec_id, *command, **options)
        return self.call("Start", id=container_id, exec_id=exec_id)

    def wait(self, container_id, exec_id=""):
        """The exit status of a process, once it has ended."""
        return self.call("Wait", id=container_id, exec_id=exec_id).exit_status

    def status(self, container_id, exec_id=""):
        """"created", "running", "stopped" or "paused"."""
        number = self.call("State", id=container_id, exec_id=exec_id).status
        return {1: "created", 2: "running", 3: "stopped", 4: "paused"}[number]

    def remove(self, container_id):
        """Kill it, wait for its end, and delete it."""
        self.call("Kill", id=container_id, signal=9, all=True)
        self.wait(container_id)
        return self.call("Delete", id=container_id)

    # -- the fake VMM -----------------------------------------------------------------------------
    def order(self, **order):
        """Give the fake VMM an order; see test/fakes/vmm.py."""
        control = gevent_socket(socket.AF_UNIX)
        with contextlib.closing(control):
            control.settimeout(WAIT_S)
            control.connect(os.path.join(self.place.run_dir, "fake.control"))
            with control.makefile("rwb") as stream:
                stream.write(json.dumps(order).encode() + b"\n")
                stream.flush()
                return json.loads(stream.readline())

    def calls(self, method):
        """How often the agent has been asked for `method`."""
        return self.order(ask="calls").count(method)

    def await_call(self, method, after=0):
        """Wait until the agent has been asked for `method` more than `after` times."""
        with green.deadline(WAIT_S, lambda: f"{method}; {os.listdir(self.place.run_root)}"):
            while not os.path.exists(os.path.join(self.place.run_dir, "fake.control")):
                gevent.sleep(0.005)
            while self.calls(method) <= after:
                gevent.sleep(0.005)

    def vmm_pid(self):
        """The pid that the shim has written into state.json."""
        return state.read(self.place.run_dir)["hypervisor"]["pid"]

    # -- the end ----------------------------------------------------------------------------------
    def shut_down(self):
        """Shutdown of the whole pod."""
        with contextlib.suppress(ConnectionClosed):
            self.call("Shutdown", id=self.id, now=True, timeout_s=60)

    def close_streams(self):
        """Close all :meth:`streams` that there are."""
        for streams in self._streams:
            streams.detach()
        self._streams.clear()

    def nothing_is_left(self):
        """Assert that the sandbox has left no file and no cgroup."""
        assert os.listdir(self.place.run_root) == []
        for parent in ("kata_sandboxed_pod", "kata_overhead"):
            assert not [hierarchy for hierarchy in cgroupfs.hierarchies()
                        if os.path.exists(hierarchy.directory(f"{parent}/{self.id}"))]

    def _close(self):
        self.close_streams()
        if self._client is not None:
            self._client.close()
        self.events.stop()


def _paths(io):
    return {} if io is None else {"stdin": io.stdin, "stdout": io.stdout, "stderr": io.stderr}


class InProcess(Pod):
    """A Shim and its TaskService in this process.

    :param faults: $KATASHIM_FAKE_FAULTS of its VMM.
    :ivar shim: katashim.runtime.shim.Shim.
    """

    def __init__(self, place, faults=""):
        super().__init__(place)
        self._environment = _Changed(os.environ, place.environment(faults))
        self._run_root = _Changed(vars(state), {"RUN_ROOT": place.run_root})
        self._cgroups = _own_cgroups()
        self._publisher = Publisher(place.events_path, NAMESPACE)
        self.shim = Shim(namespace=NAMESPACE, id=place.sandbox_id, bundle=place.directory, address="",
                         publisher=self._publisher)
        self.socket_path = os.path.join(place.directory, "t")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.socket_path)
        listener.listen()
        self._server = Server(listener, {TASK: TaskService(self.shim)}, name="containerd")
        self._server.start()
        self._client = _client(self.socket_path)

    @property
    def sandbox(self):
        return self.shim.sandbox

    def flush(self):
        """Wait until containerd has all events."""
        assert self._publisher.flush(WAIT_S)

    def close(self):
        """End it, whatever state it is in."""
        try:
            if not self.shim.finished.is_set():
                self.shut_down()
            for container_id in list(self.sandbox.containers) if self.sandbox else ():
                self.call("Delete", id=container_id)        # as containerd does
            self.flush()
        finally:
            self._close()
            self._publisher.close()
            self._server.stop(2)
            for changed in (self._environment, self._run_root):
                changed.undo()
            _join_cgroups(self._cgroups)


class Daemon(Pod):
    """The real program's daemon.

    :ivar pid: of the shim. :ivar log_path: where it logs.
    """

    def __init__(self, place, faults=""):
        super().__init__(place)
        self.log_path = os.path.join(place.directory, "log")
        self.bundle = place.bundle(self.id, spec("true"))
        self.environment = {
            **os.environ, **place.environment(faults), "KATASHIM_SOCKET_DIR": place.directory,
            "KATASHIM_LOG": self.log_path, "TTRPC_ADDRESS": place.events_path,
            "KATASHIM_PYTHON": sys.executable,
            "GEVENT_MONITOR_THREAD_ENABLE": "true", "GEVENT_MAX_BLOCKING_TIME": "0.5"}
        self.verb("start")
        with open(os.path.join(self.bundle, "shim.pid")) as file:
            self.pid = int(file.read())
        self.start_time = child.start_time(self.pid)
        self.socket_path = endpoint.socket_path(place.directory, "/run/c.sock", NAMESPACE, self.id)
        self._client = _client(self.socket_path)

    def verb(self, name):
        """Execute the program; returns what it prints."""
        words = [PROGRAM, "-namespace", NAMESPACE, "-address", "/run/c.sock", "-publish-binary", "/bin/false",
                 "-id", self.id, *(["-bundle", self.bundle] if name == "delete" else []), name]
        done = subprocess.run(words, cwd=self.bundle, env=self.environment, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kill(self):
        """SIGKILL for the shim."""
        child.kill_identity(self.pid, self.start_time, signal.SIGKILL)

    def await_exit(self, timeout_s=WAIT_S):
        """Wait until the shim has ended by itself; whether it has."""
        return green.in_thread(child.wait_gone, self.pid, self.start_time, timeout_s, timeout_s=timeout_s + 5,
                               what="the end of the shim")

    def log(self):
        with open(self.log_path) as file:
            return file.read()

    def close(self):
        try:
            if child.is_alive(self.pid, self.start_time):
                self.shut_down()
                if not self.await_exit():
                    self.kill()
                    raise AssertionError(f"the shim did not end after its Shutdown:\n{self.log()}")
        finally:
            self.verb("delete")
            self._close()
        log = self.log()
        assert "appears to be blocked" not in log, log      # the words of gevent's monitor
        assert "Traceback" not in log, log


def _client(path):
    sock = gevent_socket(socket.AF_UNIX)
    sock.connect(path)
    return Client(sock, "the shim")


class _Changed:
    """Values in a mapping, until :meth:`undo`."""

    def __init__(self, mapping, values):
        self._mapping = mapping
        self._old = {key: mapping.get(key) for key in values}
        mapping.update(values)

    def undo(self):
        for key, value in self._old.items():
            if value is None:
                self._mapping.pop(key, None)
            else:
                self._mapping[key] = value


def _own_cgroups():
    """``{mount point: path}`` of this process, which an in-process shim moves about."""
    with open("/proc/self/cgroup") as file:
        lines = [line.rstrip("\n").split(":", 2) for line in file]
    found = {}
    for hierarchy in cgroupfs.hierarchies():
        for number, controllers, path in lines:
            if set(controllers.split(",")) & set(hierarchy.controllers) and hierarchy.version == 1 \
                    or number == "0" and hierarchy.version == 2:
                found[hierarchy.root] = path
    return found


def _join_cgroups(cgroups):
    now = _own_cgroups()
    for root, path in cgroups.items():
        if now.get(root) != path:
            with open(f"{root}{path}/cgroup.procs", "w") as file:
                file.write(str(os.getpid()))
