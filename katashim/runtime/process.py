"""A process in the guest, a container's first one or an exec, and its end.

The order of its end, which everybody who waits for it relies on: the last byte of its output has been
written to the client; then WaitProcess, which makes the agent forget the process and its pipes; then,
once the event of its start is on its way, the exit status becomes visible and TaskExit is published.
"""

import logging
import time

import gevent
from gevent.event import Event

from katashim import green
from katashim.errors import AgentError, ConnectionClosed, KatashimError
from katashim.runtime import stdio as streams

log = logging.getLogger(__name__)

CREATED, RUNNING, PAUSED, STOPPED = "created", "running", "paused", "stopped"

KILLED = 137                # 128 + SIGKILL: the status of a process whose VM is gone
UNKNOWN_STATUS = 255        # the guest runs, but its agent does not know how the process ended
_LOOK_S = 0.5               # between two looks at an output that nobody reads


class Process:
    """One process.

    :param container: its katashim.runtime.container.Container.
    :param exec_id: "" for the container's own.
    :param settings: the record with terminal, stdin, stdout, stderr as containerd named them.
    :ivar status: CREATED, RUNNING, PAUSED or STOPPED.
    :ivar exit_status: 0..255 once it has ended, and `exited_at_ns` with it (time.time_ns()); else 0.
    :ivar exited: an Event.
    """

    def __init__(self, container, exec_id, settings):
        self.container, self.exec_id, self.settings = container, exec_id, settings
        self.status = CREATED
        self.exit_status = 0
        self.exited_at_ns = 0
        self.exited = Event()
        self.announced = Event()        # not while a start is under way whose event is not published yet
        self.announced.set()
        self.stdio = None
        self._size = None               # (width, height) asked for before there was a terminal
        self._hurry = Event()           # it was killed: do not wait for a client that has gone away
        self._greenlets = []

    def __repr__(self):
        return f"<process {self.name}, {self.status}>"

    @property
    def name(self):
        return f"{self.container.id}/{self.exec_id}" if self.exec_id else self.container.id

    @property
    def ids(self):
        """How the agent addresses it."""
        return {"container_id": self.container.id, "exec_id": self.exec_id or self.container.id}

    @property
    def attended(self):
        """Whether it exists in the guest, or did: only then is there an end to tell of."""
        return bool(self._greenlets)

    # -- its beginning ----------------------------------------------------------------------------
    def open_stdio(self, namespace):
        """Open the host's ends of its streams."""
        self.stdio = streams.open_stdio(
            self.settings.stdin, self.settings.stdout, self.settings.stderr, self.settings.terminal,
            container_id=self.container.id, exec_id=self.exec_id, namespace=namespace)

    def attend(self):
        """It exists in the guest: copy its streams and wait for its end, from now on."""
        agent = self.container.sandbox.agent
        outputs = [green.spawn(f"stdout of {self.name}", self._copy_out, agent.ReadStdout, self.stdio.stdout)]
        if not self.settings.terminal:
            outputs.append(
                green.spawn(f"stderr of {self.name}", self._copy_out, agent.ReadStderr, self.stdio.stderr))
        stdin = green.spawn(f"stdin of {self.name}", self._copy_in, agent)
        waiter = green.spawn(f"end of {self.name}", self._await_end, agent, outputs)
        self._greenlets = [*outputs, stdin, waiter]
        if self._size is not None:
            self._resize_first()

    def _resize_first(self):
        try:
            self.resize(*self._size)
        except (AgentError, ConnectionClosed) as exc:   # it has ended already
            log.debug("the terminal of %s keeps its size: %s", self.name, exc)

    def started(self):
        """The start has succeeded. (An end that was seen meanwhile stays the end.)"""
        if self.status == CREATED:
            self.status = RUNNING

    # -- while it runs ----------------------------------------------------------------------------
    def resize(self, width, height):
        """Set the size of its terminal; kept for later when it has not been started yet."""
        if self.status == CREATED and self.exec_id:
            self._size = (width, height)
            return
        self.container.sandbox.agent.TtyWinResize(**self.ids, row=height, column=width)

    def close_stdin(self):
        """CloseIO."""
        if self.stdio is not None:
            self.stdio.close_stdin()

    def hurry(self):
        """It has been killed, so its end must be seen even while nobody reads its output."""
        self._hurry.set()

    def close(self):
        """Give its streams back; who waits for its end is answered. Bounded by the time a logging program gets."""
        gevent.killall(self._greenlets, block=False)
        if self.stdio is not None:
            self.stdio.close()
        if not self.exited.is_set():        # it never ran, so no event tells of its end
            self._ended(UNKNOWN_STATUS)

    # -- its end ----------------------------------------------------------------------------------
    def end(self, status):
        """Record its end, once, and publish it."""
        if not self.exited.is_set():
            self._ended(status)
            self.container.process_ended(self)

    def _ended(self, status):
        self.exit_status = status & 0xFF if status >= 0 else UNKNOWN_STATUS
        self.exited_at_ns = time.time_ns()
        self.status = STOPPED
        self.exited.set()

    def _copy_out(self, read, sink):
        def next_bytes():
            try:
                return read(**self.ids, len=streams.CHUNK_BYTES).data
            except AgentError as exc:       # a terminal ends with EIO; an unknown process has no output
                log.debug("output of %s ends: %s", self.name, exc)
                return b""
            except ConnectionClosed:
                return b""
        streams.copy_out(next_bytes, sink, f"output of {self.name}")

    def _copy_in(self, agent):
        if self.settings.terminal and not self.stdio.has_stdin:
            return
        try:
            streams.copy_in(self.stdio, lambda data: agent.WriteStdin(**self.ids, data=data),
                            lambda: agent.CloseStdin(**self.ids))
        except (AgentError, ConnectionClosed) as exc:   # it ended, or closed its stdin: nobody to tell
            log.debug("stdin of %s ends: %s", self.name, exc)

    def _await_end(self, agent, outputs):
        self._await_outputs(outputs)
        status = self._ask_for_status(agent)
        self.announced.wait()
        self.end(status)

    def _await_outputs(self, outputs):
        """Until the last byte is with the client, or it is certain that nobody will take it."""
        pending = outputs
        while pending and not self._hurry.is_set():
            gevent.wait([*pending, self._hurry], count=1)
            pending = [output for output in pending if not output.dead]
        while pending and not self.stdio.unread():
            gevent.wait(pending, timeout=_LOOK_S)
            pending = [output for output in pending if not output.dead]

    def _ask_for_status(self, agent):
        try:
            return agent.WaitProcess(**self.ids).status
        except ConnectionClosed:
            return KILLED
        except KatashimError as exc:
            if self._hurry.is_set():        # it was killed, and the agent has forgotten it
                return KILLED
            log.warning("the end of %s is not known: %s", self.name, exc)
            return UNKNOWN_STATUS
