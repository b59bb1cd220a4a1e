"""The shim as containerd sees it: one namespace, at most one sandbox, and its end.

katashim.services.task translates requests into calls on this object; it knows no RPC message.
"""

import logging
from typing import NamedTuple

from gevent.event import Event
from gevent.lock import BoundedSemaphore

from katashim import oci, state
from katashim.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound
from katashim.runtime.container import Container
from katashim.runtime.sandbox import Sandbox
from katashim.timeline import Timeline, process_age_ms

log = logging.getLogger(__name__)


class Create(NamedTuple):
    """What containerd says of a container to create."""

    id: str
    bundle: str
    rootfs: tuple = ()          # dicts with type, source, target, options
    terminal: bool = False
    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    config_path: str = ""       # of the runtime's options in containerd's configuration


class Exec(NamedTuple):
    """What containerd says of a process to execute."""

    exec_id: str
    terminal: bool = False
    stdin: str = ""
    stdout: str = ""
    stderr: str = ""


class Shim:
    """One shim.

    :param namespace: containerd's. :param id: the sandbox's id, that of its first container.
    :param bundle, address: of that container, and of the socket served; for people.
    :param publisher: katashim.services.events.Publisher.
    :ivar sandbox: None until the first Create. :ivar finished: Event: the process should exit.
    """

    def __init__(self, *, namespace, id, bundle, address, publisher):
        self.namespace, self.id, self.bundle, self.address = namespace, id, bundle, address
        self.publisher = publisher
        self.timeline = Timeline(zero_ms=process_age_ms())
        self.timeline.add("shim", 0.0, self.timeline.now_ms())
        self.sandbox = None
        self.finished = Event()
        self._first = BoundedSemaphore(1)       # one sandbox, however many Creates come at once

    def create(self, settings):
        """Create a container, and the sandbox with the first one; returns the :class:`Container`.

        :param settings: a :class:`Create`.
        """
        state.check_id(settings.id, "container id")
        if not settings.bundle.startswith("/"):
            raise InvalidArgument(f"the bundle {settings.bundle!r} of {settings.id} is not an absolute path")
        spec = oci.load_spec(settings.bundle)
        with self._first:
            if self.sandbox is None:
                self._start_sandbox(settings, spec)
        container = Container(self.sandbox, settings, spec)
        self.sandbox.add(container)
        return container

    def _start_sandbox(self, settings, spec):
        if oci.sandbox_id(spec, settings.id) != self.id:
            raise FailedPrecondition(
                f"container {settings.id} belongs to the sandbox {oci.sandbox_id(spec, settings.id)}, "
                f"but this shim serves {self.id}, which has not been created")
        from katashim import config
        from katashim.resources import cpumem
        with self.timeline.phase("config"):
            settled = cpumem.sized(
                config.load(settings.config_path or None, annotations=oci.annotations(spec)), spec)
        if settled.runtime.enable_debug:
            logging.getLogger("katashim").setLevel(logging.DEBUG)
        sandbox = Sandbox(self, settled, spec, settings.bundle)
        self.sandbox = sandbox
        try:
            sandbox.boot()
        except BaseException:
            self._give_up(sandbox)
            raise

    def _give_up(self, sandbox):
        """Its boot has failed, or whoever asked for it has gone away in the middle: end what there is of
        it. After that another Create may try again."""
        try:
            sandbox.stop()
        except DeadlineExceeded as exc:
            log.warning("%s; it goes on in the background", exc)
        self.sandbox = None

    def is_empty(self):
        """Whether it has no container (which it may have had)."""
        return self.sandbox is None or not self.sandbox.containers

    def container(self, container_id):
        """The container `container_id`. :raises NotFound:"""
        if self.sandbox is None:
            raise NotFound(f"no container {container_id!r}: this shim has no sandbox")
        return self.sandbox.container(container_id)

    def start(self, container_id, exec_id):
        """Start a container's first process or an exec; returns the process."""
        container = self.container(container_id)
        process = container.process(exec_id)
        self.sandbox.check_ready()
        if process is container.init:
            with self.timeline.phase("start"):
                container.start()
            self.sandbox.record()
        else:
            container.start_exec(process)
        return process

    def delete(self, container_id, exec_id):
        """Delete a container or forget an exec; returns the process that it was."""
        container = self.container(container_id)
        process = container.process(exec_id)
        if process is container.init:
            self.sandbox.remove(container)
        else:
            container.delete_exec(process)
        return process

    def shutdown(self, container_id, now):
        """End the sandbox and this process, when the sandbox's own container says so, or `now`.

        For a member of a pod it does nothing: the sandbox outlives it, and another may come.
        """
        if self.sandbox is None:
            log.info("shut down without a sandbox")
            self.finished.set()
            return
        if not now and container_id != self.id:
            return
        try:
            self.sandbox.stop()
        finally:
            self.finished.set()
