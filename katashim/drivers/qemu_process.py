"""One QEMU process from its launch to its end, with everything that hangs on it.

QEMU inherits by descriptor what it is given: its monitor's listening socket (so that connecting never
comes too early), the console, its stderr, taps, vhost files. Its end is seen by pidfd, whatever the
cause, and fails everything that waits for it. Made by katashim.drivers.qemu.
"""

import contextlib
import logging
import os
import re
import socket
from typing import NamedTuple

from gevent.event import Event

from katashim import child, green
from katashim.drivers import base, qemu_cmdline, qmp
from katashim.drivers.console import Tail
from katashim.errors import DeadlineExceeded, HypervisorError, KatashimError

log = logging.getLogger(__name__)

_AGENT_MARK = re.compile(rb"kata-agent|katashim agent")     # in the first line that the agent prints
_STDERR_BYTES = 16 * 1024
_QUIT_S = 2.0                       # for QEMU to end by itself when asked to; then it is killed
_REAP_S = 10.0
_LAST_WORDS_S = 1.0
_LAST_EVENT_S = 0.2
_PAGE = 4096
_COPY_S = 30


class _Descriptors(NamedTuple):
    """What QEMU inherits, and what of it stays ours."""

    listener: object
    console: int
    console_theirs: int
    stderr: int
    stderr_theirs: int


class QemuProcess:
    """A running or ended QEMU. The constructor launches it.

    :param plan: katashim.drivers.qemu_plan.Plan.
    :param qmp_path: where the monitor's socket is made.
    :param devices: arguments of the devices, see katashim.drivers.qemu_cmdline.
    :param pass_fds: further descriptors to inherit, named in `devices`.
    :param undo: gets the process and the socket.
    :param netns: path of QEMU's network namespace, or None.
    :ivar child: katashim.child.Child. :ivar qmp: katashim.drivers.qmp.Qmp, not connected yet.
    :ivar console: the guest console's Tail; also after the end.
    :ivar exited: gevent Event, set when it has ended and `vm_exit` (a base.VmExit) is there.
    :raises HypervisorError: it cannot be executed.
    """

    def __init__(self, plan, sandbox_id, qmp_path, devices, *, pass_fds=(), undo, netns=None):
        self.vm_exit = None
        self.exited = Event()
        self._socket = undo.push("file", path=qmp_path)
        with _initrd_for(plan) as (plan, initrd_fds):
            fds = _open_descriptors(qmp_path)
            try:
                argv = qemu_cmdline.command_line(
                    plan, sandbox_id, qmp_fd=fds.listener.fileno(), console_fd=fds.console_theirs,
                    devices=devices)
                log.debug("starting %s", argv)
                self._launch(argv, fds, [*pass_fds, *initrd_fds], undo, netns)
            finally:
                fds.listener.close()
                os.close(fds.console_theirs)
                os.close(fds.stderr_theirs)
        self.console = Tail(f"console of sandbox {sandbox_id}", fds.console, mark=_AGENT_MARK,
                            log_lines=plan.debug)
        self._stderr = Tail("stderr of QEMU", fds.stderr, size=_STDERR_BYTES, log_lines=True)
        self.qmp = qmp.Qmp(f"QEMU of sandbox {sandbox_id}", lambda: qmp.dial(qmp_path))
        green.spawn(f"watch over QEMU {self.child.pid}", self._watch)

    def abandon(self, exc):
        """Kill what a failed start left and attach the evidence to `exc`.

        :raises HypervisorError: QEMU had ended by itself; its own words say more than `exc`.
        """
        # A QEMU that hangs up is about to exit; one that is merely late is not.
        ended_by_itself = self.child.wait(0 if isinstance(exc, DeadlineExceeded) else 1.0) is not None
        self.qmp.close("the start failed")
        self.child.kill()
        self.exited.wait(_REAP_S)
        error = exc
        if ended_by_itself:
            error = HypervisorError(f"QEMU ended while it was starting: {self.vm_exit.reason}")
        error.attach("QEMU's stderr", self._stderr.text())
        error.attach("the guest's console", self.console.text())
        if error is not exc:
            raise error from exc

    def stop(self, timeout_s):
        """Ask QEMU to quit for a part of the time, then kill it. Any number of times.

        :raises DeadlineExceeded: the kernel does not let it die.
        """
        watch = green.Stopwatch(timeout_s)
        if self.child.returncode is None:
            self._ask_to_quit(min(_QUIT_S, timeout_s / 2))
        self.qmp.close("the VM is being stopped")
        self.child.kill()
        if self.child.wait(watch.left(least=1.0)) is None:
            raise DeadlineExceeded(f"QEMU (pid {self.child.pid}) still exists {timeout_s:g} s after "
                                   "it was told to stop, and killed")
        self.exited.wait(_REAP_S)
        self.console.close()
        self._stderr.close()
        entry, self._socket = self._socket, None
        if entry is not None:
            entry.release()

    def _launch(self, argv, fds, pass_fds, undo, netns):
        self._entry = undo.push("process", pid=0, start_time=0, name="QEMU")
        try:
            self.child = child.spawn(
                argv, name="QEMU", cwd="/", netns=netns, stderr=fds.stderr_theirs,
                pass_fds=[fds.listener.fileno(), fds.console_theirs, *pass_fds])
        except BaseException:
            self._entry.forget()
            os.close(fds.console)
            os.close(fds.stderr)
            raise
        self._entry.update(pid=self.child.pid, start_time=self.child.start_time)

    def _ask_to_quit(self, timeout_s):
        watch = green.Stopwatch(timeout_s)
        try:
            self.qmp.execute("quit", timeout_s=timeout_s)
        except KatashimError as exc:
            log.info("QEMU (pid %d) does not take `quit`, so it is killed: %s", self.child.pid, exc)
            return
        self.child.wait(watch.left())

    def _watch(self):
        """Wait for the end of QEMU, whatever its cause, and tell everybody."""
        with self.qmp.subscribe("SHUTDOWN") as events:
            self.child.exited.wait()
            reason = self._last_event(events)
        self._stderr.wait_end(_LAST_WORDS_S)
        status = self.child.returncode
        ending = f"{self.child.ending()} after {reason}" if reason else self.child.ending()
        words = ": ".join(word for word in (ending, self._stderr.last_line()) if word)
        self.vm_exit = base.VmExit(status if status >= 0 else 128 - status, words)
        self._entry.forget()
        self.qmp.close(f"QEMU {self.child.ending()}")
        self.exited.set()
        log.info("QEMU (pid %d) %s", self.child.pid, words)

    def _last_event(self, events):
        """QEMU's own reason for its end, which it tells just before: "guest-shutdown", "guest-reset", ..."""
        if self.child.returncode != 0:
            return ""
        try:
            event = events.wait(_LAST_EVENT_S)
        except KatashimError:
            return ""
        return event.data["reason"]


def _open_descriptors(qmp_path):
    with contextlib.ExitStack() as opened:
        try:
            listener = opened.enter_context(qmp.listen(qmp_path))
            ours, theirs = map(opened.enter_context, socket.socketpair())
            stderr, stderr_theirs = os.pipe()
        except OSError as exc:
            raise HypervisorError(f"cannot make pipes for QEMU: {exc.strerror}") from exc
        opened.pop_all()
    return _Descriptors(listener, ours.detach(), theirs.detach(), stderr, stderr_theirs)


# -- the initrd of a microvm ----------------------------------------------------------------------
@contextlib.contextmanager
def _initrd_for(plan):
    """``(plan, descriptors)`` with an initrd that a microvm's ACPI tables survive.

    QEMU loads an initrd to the very end of memory, in whole pages, and newer firmware (that of Debian
    13) has put the ACPI tables there. They survive only in the page that is left free when the initrd
    fills its own pages exactly. So any other one is passed as a padded copy in memory.
    """
    if plan.machine != "microvm" or not plan.acpi or not plan.initrd or not os.stat(plan.initrd).st_size % _PAGE:
        yield plan, ()
        return
    copy = green.in_thread(_padded_copy, plan.initrd, what=f"copying {plan.initrd}", timeout_s=_COPY_S)
    try:
        yield plan._replace(initrd=f"/proc/self/fd/{copy}"), (copy,)
    finally:
        os.close(copy)


def _padded_copy(path):
    """A memfd with the file's content and zeros up to a whole page."""
    copy = os.memfd_create("initrd")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while sent := os.sendfile(copy, file.fileno(), None, size):
                size -= sent
        os.ftruncate(copy, -(-os.fstat(copy).st_size // _PAGE) * _PAGE)
    except BaseException:
        os.close(copy)
        raise
    return copy
