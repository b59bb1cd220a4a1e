"""The pod: what its containers share. Namespaces, storages, resolv.conf, the queue of OOM events.

Called by services.py.
"""

import os
import threading
from _queue import SimpleQueue
from _socket import sethostname

from katashim.guest.agent import cgroup, linux, mounts
from katashim.guest.agent.container import BASE_DIR, Container
from katashim.guest.agent.hooks import Hooks
from katashim.guest.agent.rpcerror import INTERNAL, RpcError, invalid_container_id
from katashim.guest.agent.storage import Storages

_NAMESPACE_DIR = "/var/run/sandbox-ns"
_NAMESPACES = {"ipc": linux.CLONE_NEWIPC, "uts": linux.CLONE_NEWUTS}


class Sandbox:
    """The one pod of this guest.

    :param settings: settings.Settings.
    """

    def __init__(self, settings):
        self.settings = settings
        self.id = ""
        self.hostname = ""
        self.hooks = Hooks()
        self._lock = threading.Lock()       # guards the tables below
        self._containers = {}
        self._creating = threading.Lock()   # held while a container is created: they are made one by one
        self._namespaces = {}
        self._pid_namespace = ""
        self._oom_events = SimpleQueue()
        self._oom_watch = cgroup.OomWatch(self._oom_events.put)
        self._storages = Storages(settings.hotplug_timeout)
        self._destroyed = False

    # -- the pod ----------------------------------------------------------------------------------
    def set_up(self, request):
        """Start anew with what CreateSandbox says."""
        mounts.remove_tree(BASE_DIR)
        os.makedirs(BASE_DIR)
        self.id, self.hostname = request.sandbox_id, request.hostname
        for kind in _NAMESPACES:
            self._namespaces[kind] = _persistent_namespace(kind, self.hostname)
        for module in request.kernel_modules:
            _load_module(module)
        self._storages = Storages(self.settings.hotplug_timeout)    # what was mounted before is unmounted
        self._storages.add(request.storages, "")
        self.hooks = Hooks(request.guest_hook_path)
        if request.dns:
            _write_resolv_conf(request.dns)

    def namespace_path(self, kind):
        """The pod's namespace of `kind` ("ipc", "uts"), "" before the pod is set up."""
        return self._namespaces.get(kind, "")

    def destroy(self):
        """Remove all containers and end whoever waits for an OOM event.

        :raises RpcError: it was done before. :raises OSError: a container could not be removed.
        """
        with self._lock:
            if self._destroyed:
                raise RpcError(INTERNAL, '"failed to get sandbox sender channel"')
            self._destroyed = True
            containers, self._containers = self._containers, {}
        self._oom_events.put(None)
        for container in containers.values():
            container.remove()

    def next_oom_event(self):
        """Wait for an OOM kill; returns the container's id. :raises RpcError: the pod is gone."""
        cid = self._oom_events.get()
        if cid is None:
            self._oom_events.put(None)      # for the next one who asks
            raise RpcError(INTERNAL, '""')
        return cid

    # -- containers -------------------------------------------------------------------------------
    def container(self, cid, missing=invalid_container_id):
        """The container `cid`. :param missing: makes the error when there is none."""
        with self._lock:
            found = self._containers.get(cid)
        if found is None:
            raise missing()
        return found

    def containers(self):
        """All containers, a list."""
        with self._lock:
            return list(self._containers.values())

    def create_container(self, request):
        """Make a container. :param request: the ``grpc.CreateContainerRequest``.

        :raises RpcError: the id is taken, or it cannot be made.
        """
        cid = request.container_id
        with self._creating:
            with self._lock:
                if cid in self._containers:
                    raise RpcError(INTERNAL, f"container {cid} exists already")
                others = bool(self._containers)
            namespace = ""
            if request.sandbox_pidns:
                namespace = self._pid_namespace
                if others and not namespace:
                    raise RpcError(INTERNAL, "Sandbox does not have sandbox_pidns")
            container = Container(cid)
            container.storages = self._storages.add(request.storages, cid)
            try:
                container.create(request, self, namespace)
            except BaseException:
                self._storages.release(container.storages)
                raise
            with self._lock:
                self._containers[cid] = container
                if not self._pid_namespace:
                    self._pid_namespace = f"/proc/{container.init_pid()}/ns/pid"

    def start_container(self, cid):
        """Run a container's program, and watch its memory unless it is the pod's own."""
        container = self.container(cid)
        if cid != self.id and container.cgroup is not None:
            self._oom_watch.watch(cid, container.cgroup)
        container.start()

    def has_ended(self, cid):
        """The init of a container has: an OOM kill is told before its status, which may be the end of all."""
        self._oom_watch.look(cid)

    def remove_container(self, cid):
        """Take a container away."""
        container = self.container(cid)
        self._oom_watch.forget(cid)
        container.remove()
        self._storages.release(container.storages)
        with self._lock:
            self._containers.pop(cid, None)


def _load_module(module):
    from katashim.guest.agent import programs
    done = programs.run(["/sbin/modprobe", "-v", module.name, *module.parameters], timeout_s=30)
    if done.status != 0:
        raise RpcError(INTERNAL, f"load_kernel_module return code: {done.status} {done.text()}")


def _persistent_namespace(kind, hostname):
    """Make a namespace that lives without processes, by a bind mount; returns its path.

    A thread makes it and ends, so that the agent's own namespaces stay as they are.
    """
    path = f"{_NAMESPACE_DIR}/{kind}"
    os.makedirs(_NAMESPACE_DIR, exist_ok=True)
    if os.path.ismount(path) or os.path.exists(path):
        _detach(path)
    open(path, "w").close()
    failure = []

    def make():
        try:
            linux.unshare(_NAMESPACES[kind])
            if kind == "uts" and hostname:
                sethostname(hostname)
            linux.bind(f"/proc/thread-self/ns/{kind}", path)
        except OSError as exc:
            failure.append(exc)

    thread = threading.Thread(target=make, name=f"{kind} namespace")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return path


def _detach(path):
    try:
        linux.umount(path, linux.MNT_DETACH)
    except OSError:
        pass        # a plain file, left by a pod whose namespace was never bound


def _write_resolv_conf(lines):
    """Bind the host's resolv.conf lines over the guest's, when the guest has one."""
    if not os.path.exists("/etc/resolv.conf"):
        return
    path = f"{BASE_DIR}/sandbox/resolv.conf"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write("\n".join(line.strip() for line in lines) + "\n")
    linux.bind(path, "/etc/resolv.conf")
