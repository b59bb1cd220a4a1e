"""A fake hypervisor for tests of everything above the drivers: a real process instead of a VM.

``[hypervisor.fake]`` with $KATASHIM_FAKE_VMM in the shim's environment: the command line of a program
(words as a shell would split them) that plays VMM and guest; test/fakes/vmm.py is one, and tells the
contract. It isolates nothing, so without that variable there is no such driver, and no pod's annotation
can bring it about.

A verified fake: it is started, watched, asked to quit and killed as the real drivers are, and passes the
same tests. Devices get addresses and exist nowhere. Implements katashim.drivers.base.Hypervisor.
"""

import contextlib
import json
import os
import shlex
import signal
import socket

import gevent
from gevent.event import Event
from gevent.socket import socket as gevent_socket

from katashim import child, green
from katashim.drivers import base
from katashim.drivers.console import Tail
from katashim.errors import (
    ConfigError,
    DeadlineExceeded,
    FailedPrecondition,
    HypervisorError,
    KatashimError,
)

ENVIRONMENT = "KATASHIM_FAKE_VMM"
AGENT_PORT = 1024
_QUIT_S = 2.0


class Fake(base.Hypervisor):
    """See :class:`katashim.drivers.base.Hypervisor` and the module's text; arguments as for the QEMU driver.

    :ivar control_path: the socket by which a test gives the fake VMM its orders.
    """

    name = "fake"
    capabilities = frozenset({base.BLOCK_DEVICE, base.BLOCK_HOTPLUG, base.BLOCK_UNPLUG, base.NET_DEVICE,
                              base.NET_HOTPLUG, base.NET_UNPLUG, base.HYBRID_VSOCK, base.PAUSE})

    def __init__(self, sandbox_id, run_dir, hypervisor_config, undo, *, netns=None, timeline=None):
        self.sandbox_id = sandbox_id
        self.console = None
        self.control_path = os.path.join(run_dir, "fake.control")
        self._vsock_path = os.path.join(run_dir, "fake.hvsock")
        self._undo, self._netns, self._timeline = undo, netns, timeline
        self._command = None
        self._child = self._channel = self._stderr = None
        self._devices = {}              # (record type, its id): the record with its address
        self._version = ""
        self._vm_exit = None
        self._exited = Event()
        self._stopped = False

    # -- lifecycle --------------------------------------------------------------------------------
    def prepare(self):
        self._command = shlex.split(os.environ.get(ENVIRONMENT, ""))
        if not self._command:
            raise ConfigError(f"hypervisor_name = fake: ${ENVIRONMENT} names no program")

    def start(self, timeout_s):
        if self._command is None or self._child is not None or self._stopped:
            raise FailedPrecondition(f"the VM of sandbox {self.sandbox_id} is not prepared, or was started")
        phase = self._timeline.phase("spawn") if self._timeline else contextlib.nullcontext()
        with phase:
            self._spawn()
            try:
                with green.deadline(timeout_s, "the fake VMM to be ready"):
                    self._await_ready()
            except KatashimError as exc:
                self._child.kill()
                self._exited.wait(_QUIT_S)
                raise exc.attach("the fake VMM's stderr", self._stderr.text())

    def stop(self, timeout_s=10):
        self._stopped = True
        if self._child is None:
            return
        if self._child.returncode is None:
            self._ask_to_quit()
            self._child.wait(min(_QUIT_S, timeout_s / 2))
        self._child.kill()
        if self._child.wait(timeout_s) is None:
            raise DeadlineExceeded(f"the fake VMM (pid {self._child.pid}) still exists {timeout_s:g} s "
                                   "after it was killed")
        self._exited.wait(timeout_s)
        self._channel.close()
        self.console.close()
        self._stderr.close()

    def wait(self, timeout_s=None):
        self._exited.wait(timeout_s)
        return self._vm_exit

    def pause(self):
        self._check_running()
        self._child.kill(signal.SIGSTOP)

    def resume(self):
        self._check_running()
        self._child.kill(signal.SIGCONT)

    # -- devices ----------------------------------------------------------------------------------
    def add_device(self, device):
        if not isinstance(device, (base.Disk, base.Nic)):
            raise self.unsupported(f"devices of the kind {type(device).__name__}")
        if self._command is None or self._stopped:
            raise FailedPrecondition(f"the VM of sandbox {self.sandbox_id} is not prepared, or stopped")
        key = type(device), device.id
        if key not in self._devices:
            address = f"02/{len(self._devices):02x}"
            more = {"agent_type": "blk"} if isinstance(device, base.Disk) else {}
            self._devices[key] = device._replace(guest_address=address, **more)
        return self._devices[key]

    def remove_device(self, device):
        if not isinstance(device, (base.Disk, base.Nic)):
            raise self.unsupported(f"removing devices of the kind {type(device).__name__}")
        self._devices.pop((type(device), device.id), None)

    # -- facts ------------------------------------------------------------------------------------
    def agent_address(self):
        return f"hvsock://{self._vsock_path}:{AGENT_PORT}"

    def pids(self):
        return [self._child.pid] if self._child is not None and self._child.returncode is None else []

    def vcpu_threads(self):
        return dict.fromkeys([0], *self.pids()) if self.pids() else {}

    def console_tail(self):
        return self.console.text() if self.console is not None else ""

    def describe(self):
        facts = {"name": self.name, "version": self._version, "agent": self.agent_address(),
                 "devices": len(self._devices)}
        if self._child is not None:
            facts.update(pid=self._child.pid, start_time=self._child.start_time)
        return facts

    # -- the process ------------------------------------------------------------------------------
    def _spawn(self):
        for path in (self._vsock_path, self._vsock_path + ".agent", self.control_path):
            self._undo.push("file", path=path)
        ours, theirs = socket.socketpair()
        console, console_theirs = os.pipe()
        stderr, stderr_theirs = os.pipe()
        argv = [*self._command, "--id", self.sandbox_id, "--vsock", self._vsock_path,
                "--control", self.control_path, "--channel", str(theirs.fileno())]
        entry = self._undo.push("process", pid=0, start_time=0, name="the fake VMM")
        try:
            self._child = child.spawn(argv, name="the fake VMM", netns=self._netns, stdout=console_theirs,
                                      stderr=stderr_theirs, pass_fds=[theirs.fileno()])
        except BaseException:
            entry.forget()
            ours.close()
            os.close(console)
            os.close(stderr)
            raise
        finally:
            theirs.close()
            os.close(console_theirs)
            os.close(stderr_theirs)
        entry.update(pid=self._child.pid, start_time=self._child.start_time)
        self._channel = gevent_socket(fileno=ours.detach())
        self.console = Tail(f"console of sandbox {self.sandbox_id}", console)
        self._stderr = Tail("stderr of the fake VMM", stderr)
        green.spawn(f"watch over the fake VMM {self._child.pid}", self._watch, entry)

    def _await_ready(self):
        said = b""
        while not said.endswith(b"\n"):
            piece = self._channel.recv(64)
            if not piece:
                self._exited.wait()
                raise HypervisorError(f"the fake VMM ended while it was starting: {self._vm_exit.reason}")
            said += piece
        self._version = json.loads(said)["ready"]

    def _ask_to_quit(self):
        try:
            with gevent.Timeout(_QUIT_S, False):
                self._channel.sendall(b'"quit"\n')
        except OSError:
            pass                        # it hears nothing any more: it will be killed

    def _watch(self, entry):
        self._child.exited.wait()
        self._stderr.wait_end(1.0)
        status = self._child.returncode
        words = ": ".join(word for word in (self._child.ending(), self._stderr.last_line()) if word)
        self._vm_exit = base.VmExit(status if status >= 0 else 128 - status, words)
        entry.forget()
        self._exited.set()

    def _check_running(self):
        if not self.pids():
            raise FailedPrecondition(f"the VM of sandbox {self.sandbox_id} does not run")
