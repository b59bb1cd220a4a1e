"""One container: from the host's spec to a running init, its other processes, and its removal.

The verbs of one container that change it are serialised by its lock; reading, waiting and signalling
are not, so nothing that waits for a process holds up anything else. Called by sandbox.py, services.py.
"""

import os
import threading

from katashim.guest.agent import (
    cgroup,
    crun,
    devices,
    enter,
    hooks,
    jsontext,
    linux,
    log,
    mounts,
    passwd,
    spec,
)
from katashim.guest.agent.process import Process, Stdio
from katashim.guest.agent.rpcerror import INTERNAL, INVALID_ARGUMENT, NOT_FOUND, RpcError

BASE_DIR = "/run/kata-containers"
_SIGTERM, _SIGKILL = 15, 9
CREATED, RUNNING, PAUSED = "created", "running", "paused"


class Container:
    """A container of the sandbox.

    :ivar id: its id. :ivar bundle: its directory. :ivar rootfs: where its root is bound.
    :ivar storages: mount points of the storages that it holds. :ivar cgroup: its cgroup.Cgroup.
    """

    def __init__(self, cid):
        self.id = cid
        self.bundle = f"{BASE_DIR}/{cid}"
        self.rootfs = f"{self.bundle}/rootfs"
        self.storages = []
        self.cgroup = None
        self.annotations = {}
        self.mounts = ()
        self._oci = self._hooks = None
        self._state = None
        self._changing = threading.Lock()   # held by the verbs that change the container
        self._table = threading.Lock()      # guards _processes and _starting
        self._processes = {}                # exec id -> Process; the init's is the container's
        self._starting = set()              # exec ids that are being started

    def create(self, request, sandbox, pid_namespace):
        """Set the container up to the point before its program runs.

        :param request: the ``grpc.CreateContainerRequest``; its storages are mounted.
        :param sandbox: the sandbox.Sandbox. :param pid_namespace: path of the one to join, "" for its own.
        :raises RpcError: it cannot be; what was made of it is gone again.
        """
        oci = spec.to_oci(request.OCI)
        devices.add_to_spec(oci, request.devices, sandbox.settings.hotplug_timeout)
        root = oci["root"]["path"]
        try:
            self._bind_root(root)
            spec.amend(oci, cid=self.id, rootfs=self.rootfs, sandbox=sandbox, pid_namespace=pid_namespace,
                       unified_cgroups=cgroup.is_unified())
            self._set_home(oci["process"])
            with open(f"{self.bundle}/config.json", "w") as file:
                file.write(jsontext.dumps(oci))
            self._start_init(oci, sandbox.settings.container_pipe_size)
            sandbox.hooks.run(hooks.PRESTART, self.id, CREATED, self.init_pid(), self.bundle)
        except BaseException:
            self._end_processes()
            self._clean_up()
            raise
        self._oci, self._hooks = oci, sandbox.hooks
        self.annotations, self.mounts = oci["annotations"], oci["mounts"]
        self._state = CREATED

    def start(self):
        """Run its program."""
        with self._changing:
            init = self.process(self.id)
            crun.start(self.id, init.end)
            self._state = RUNNING
            self._hooks.run(hooks.POSTSTART, self.id, RUNNING, init.pid, self.bundle)

    def execute(self, exec_id, message, pipe_size):
        """Start another process. :param message: the ``grpc.Process``.

        :raises RpcError: the id is taken, the init is gone, or the program cannot be run.
        """
        process = spec.process(message)
        process.setdefault("capabilities", self._oci["process"].get("capabilities", {}))
        with self._table:
            if exec_id in self._processes or exec_id in self._starting:
                raise RpcError(INTERNAL, f"exec_id '{exec_id}' already exists")
            init = self._processes.get(self.id)
            if init is None or init.end.status is not None:
                raise RpcError(INTERNAL, f"container {self.id} does not run")
            self._starting.add(exec_id)
        stdio = Stdio(pipe_size)
        try:
            if enter.can_do(self._oci):
                end = enter.execute(init.pid, process, stdio)
            else:
                self._set_home(process)
                end = crun.execute(self.id, self.bundle, exec_id, process, stdio, cgroup.is_mounted())
            with self._table:
                self._processes[exec_id] = Process(end, stdio)
        except BaseException:
            stdio.started()
            stdio.close()
            raise
        finally:
            with self._table:
                self._starting.discard(exec_id)

    def process(self, exec_id):
        """The process `exec_id`; "" is the init's. :raises RpcError: it is gone, or never was."""
        with self._table:
            found = self._processes.get(exec_id or self.id)
        if found is None:
            name = "InitProcessNotFound" if exec_id in ("", self.id) else "InvalidExecId"
            raise RpcError(NOT_FOUND, name)
        return found

    def forget(self, exec_id, process):
        """Take a process that has ended out of the table; another call no longer finds it.

        :returns: to be called with whether its status was told to anybody. Only then its stdio is closed;
            otherwise it is back in the table, for whoever asks again.
        """
        with self._table:
            ours = self._processes.pop(exec_id or self.id, None) is process

        def settle(told):
            if told:
                process.close()
            elif ours:
                with self._table:
                    self._processes.setdefault(exec_id or self.id, process)
        return settle

    def signal(self, exec_id, number):
        """Send a signal. SIGKILL to the init goes to all there are, and SIGTERM becomes SIGKILL for an init
        that does nothing about it: the kernel would drop it, as for any PID 1."""
        process = self.process(exec_id)
        if exec_id == "" and number == _SIGKILL:
            self.kill_all()
        if exec_id in ("", self.id) and number == _SIGTERM and not _handles(process.pid, number):
            number = _SIGKILL
        process.signal(number)

    def kill_all(self):
        """SIGKILL everything in the container."""
        if self.cgroup is not None:
            self.cgroup.kill()
        with self._table:
            processes = list(self._processes.values())
        for process in processes:
            process.signal(_SIGKILL)

    def update(self, message):
        """Change the limits. :param message: a ``grpc.LinuxResources``."""
        resources = spec.resources(message)
        with self._changing:
            crun.update(self.id, self.bundle, resources)
            self._oci["linux"]["resources"] = resources

    def pause(self):
        """Freeze it. :raises RpcError: it is not running."""
        with self._changing:
            if self._state not in (CREATED, RUNNING):
                raise RpcError(INTERNAL, f"failed to pause container: current status is: {self._state}")
            self.cgroup.freeze(True)
            self._state = PAUSED

    def resume(self):
        """Thaw it. :raises RpcError: it is not paused."""
        with self._changing:
            if self._state != PAUSED:
                raise RpcError(INTERNAL, f"container status is: {self._state}, not paused")
            self.cgroup.freeze(False)
            self._state = RUNNING

    def remove(self):
        """Kill what runs and take everything away."""
        with self._changing:
            if self._state == PAUSED:
                self.cgroup.freeze(False)
            self._end_processes()
            self._clean_up()
            self._hooks.run(hooks.POSTSTOP, self.id, "stopped", 0, self.bundle)

    def init_pid(self):
        """The pid of its init, None when that has ended and been waited for."""
        with self._table:
            init = self._processes.get(self.id)
        return init.pid if init is not None else None

    def _bind_root(self, root):
        if not root.startswith("/"):
            raise RpcError(INVALID_ARGUMENT,
                           f"the root of container {self.id} is {root!r}, not an absolute path")
        if not os.path.isdir(self.rootfs):      # there already: a storage was mounted there
            os.makedirs(self.rootfs)
            linux.bind(root, self.rootfs, recursive=True)

    def _set_home(self, process):
        """A process without HOME gets its user's; crun knows only those that /etc/passwd lists."""
        if not any(word.startswith("HOME=") for word in process["env"]):
            process["env"].append(f"HOME={passwd.home(self.rootfs, process['user']['uid'])}")

    def _start_init(self, oci, pipe_size):
        stdio = Stdio(pipe_size)
        try:
            end = crun.create(self.id, self.bundle, stdio, oci["process"]["terminal"], cgroup.is_mounted())
        except BaseException:
            stdio.started()
            stdio.close()
            raise
        self._processes[self.id] = Process(end, stdio)
        if cgroup.is_mounted():
            self.cgroup = cgroup.Cgroup(oci["linux"]["cgroupsPath"])

    def _end_processes(self):
        self.kill_all()
        with self._table:
            processes, self._processes = self._processes, {}
        for process in processes.values():
            process.end.wait(5)
            process.close()

    def _clean_up(self):
        """Remove what create made; every step is tried."""
        for step in (lambda: crun.delete(self.id, self.cgroup), lambda: mounts.remove_tree(self.bundle)):
            try:
                step()
            except (OSError, RpcError) as exc:      # TimeoutError is an OSError
                log.warning("container", f"removing {self.id}: {exc}")


def _handles(pid, signal):
    """Whether a process blocks, ignores or catches `signal`."""
    try:
        with open(f"/proc/{pid}/status") as file:
            lines = dict(line.split(":", 1) for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return True
    return any(int(lines[name], 16) >> signal - 1 & 1 for name in ("SigBlk", "SigIgn", "SigCgt"))
