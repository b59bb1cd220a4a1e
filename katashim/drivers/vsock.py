"""The way to the guest's agent: which vsock backend this host has, and one for a sandbox.

Three can carry it, in this order of preference:

``kernel``              /dev/vhost-vsock. A context id is claimed for the guest; the open fd is the claim and
                        goes to the VMM. The agent is at ``vsock://CID:PORT``.
``vhost-device-vsock``  the rust-vmm program, a vhost-user device in a process of its own.
``builtin``             katashim/drivers/vhost_user_vsock, the same in Python.

With the last two the agent is at ``hvsock:///PATH:PORT`` (see katashim/agent/dial.py), and the VMM
connects to a vhost-user socket, which needs shared guest memory. Called by the drivers of VMMs that
have no hybrid vsock of their own, such as QEMU.
"""

import errno
import fcntl
import logging
import os
import socket
import struct
import sys
from collections import deque

import gevent
from gevent.event import Event
from gevent.os import make_nonblocking, nb_read

from katashim import child, green
from katashim.errors import ConfigError, DeadlineExceeded, HypervisorError, InvalidArgument, Unavailable

log = logging.getLogger(__name__)

KERNEL, VHOST_DEVICE, BUILTIN = "kernel", "vhost-device-vsock", "builtin"

DEVICE = "/dev/vhost-vsock"
_SET_GUEST_CID = 0x4008AF60             # VHOST_VSOCK_SET_GUEST_CID of <linux/vhost.h>
_FIRST_CID, _LAST_CID = 3, (1 << 32) - 2
_CID_TRIES = 50

_GUEST_CID = 3                          # behind a hybrid vsock each guest is alone and has the same
_PROGRAM = "vhost-device-vsock"
_START_S = 10
_LINES = 40                             # of the backend's stderr, kept for errors

_SUN_PATH_BYTES = 107                   # of unix(7)'s sun_path, without the final NUL
_PORT_SUFFIX_BYTES = len("_4294967295")     # what a backend adds for the guest's own connections
_HYBRID_NAME, _CHARDEV_NAME = "kata.hvsock", "vhost-vsock.sock"
_SHORT_PLACE = "/run/kata-vsock-"


def open_vsock(sandbox_id, run_dir, hypervisor_config, undo):
    """Make the vsock of a sandbox, before its VMM starts.

    :param run_dir: the sandbox's own directory, for sockets; where its name is too long for them, a
        directory with a short name is made below /run.
    :param hypervisor_config: ``vsock_backend`` ("auto", "kernel", "vhost-device-vsock", "builtin") and
        ``vsock_backend_path`` (of vhost-device-vsock; "" looks in PATH) are read.
    :param undo: gets the process, sockets and directory.
    :returns: :class:`VsockBackend`.
    :raises ConfigError: the configured backend is not here. :raises HypervisorError: it did not start.
    """
    kind, program = choose(hypervisor_config.vsock_backend, hypervisor_config.vsock_backend_path)
    log.debug("sandbox %s: vsock by %s", sandbox_id, program or kind)
    if kind == KERNEL:
        return _open_kernel(undo)
    place = _socket_dir(run_dir, undo)
    if kind == VHOST_DEVICE:
        return _start_vhost_device(program, place, undo)
    return _start_builtin(place, undo)


def choose(wanted, program=""):
    """Which backend to use: ``(kind, path of vhost-device-vsock or "")``.

    :param wanted: "auto", "kernel", "vhost-device-vsock" or "builtin". :param program: see `open_vsock`.
    :raises ConfigError: `wanted` is not to be had here.
    """
    if wanted in ("auto", KERNEL):
        try:
            os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
            return KERNEL, ""
        except OSError as exc:
            if wanted == KERNEL:
                raise ConfigError(f"vsock_backend = kernel: cannot open {DEVICE}: {exc.strerror}; "
                                  "load the module vhost_vsock or set vsock_backend = auto") from exc
    if wanted in ("auto", VHOST_DEVICE):
        found = _which(program or _PROGRAM)
        if found:
            return VHOST_DEVICE, found
        if wanted == VHOST_DEVICE or program:
            raise ConfigError(f"vsock_backend = {wanted}: there is no program "
                              f"{program or _PROGRAM + ' in PATH'}; install it or correct vsock_backend_path")
    return BUILTIN, ""


class VsockBackend:
    """What carries a sandbox's vsock; made by :func:`open_vsock`.

    :ivar kind: "kernel" or "vhost-user", which decides on the VMM's device.
    :ivar backend: KERNEL, VHOST_DEVICE or BUILTIN.
    :ivar cid: the guest's context id.
    :ivar vhost_fd: kernel only: the open /dev/vhost-vsock for the VMM to inherit, else -1.
    :ivar chardev_path: vhost-user only: the socket that the VMM connects to, else "".
    :ivar exited: gevent Event, set when its process has ended; never set with the kernel's.
    """

    def __init__(self, backend, cid, *, vhost_fd=-1, chardev_path="", hybrid_path="", process=None):
        self.kind = "kernel" if backend == KERNEL else "vhost-user"
        self.backend, self.cid, self.vhost_fd = backend, cid, vhost_fd
        self.chardev_path, self._hybrid_path = chardev_path, hybrid_path
        self._process = process
        self.exited = process.child.exited if process else Event()

    def address(self, port):
        """Where the guest's `port` can be dialled: a URL for :func:`katashim.agent.dial.connect`."""
        if self.kind == "kernel":
            return f"vsock://{self.cid}:{port}"
        return f"hvsock://{self._hybrid_path}:{port}"

    def listen_path(self, port):
        """The unix socket at which a host program gets the guest's connections to CID 2, `port`.

        :raises InvalidArgument: with the kernel's vsock there is none; bind to ``VMADDR_CID_HOST``.
        """
        if self.kind == "kernel":
            raise InvalidArgument("the kernel's vsock has no unix sockets for the guest's connections")
        return f"{self._hybrid_path}_{port}"

    def pids(self):
        """Host pids of the process behind it: none or one."""
        running = self._process and self._process.child.returncode is None
        return [self._process.child.pid] if running else []

    def log_text(self):
        """The last lines that its process printed."""
        return "\n".join(self._process.lines) if self._process else ""

    def stop(self):
        """End it: the process and its sockets, or the claim to the context id. Any number of times."""
        if self._process is not None:
            self._process.stop()
        if self.vhost_fd >= 0:
            os.close(self.vhost_fd)
            self.vhost_fd = -1


# -- the kernel's ---------------------------------------------------------------------------------
def _open_kernel(undo):
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        cid = claim_cid(fd)
    except BaseException:
        os.close(fd)
        raise
    backend = VsockBackend(KERNEL, cid, vhost_fd=fd)
    undo.call("the vsock context id", backend.stop)
    return backend


def claim_cid(fd, ioctl=fcntl.ioctl):
    """Claim a free context id for the guest of an open /dev/vhost-vsock; returns it.

    Nobody keeps a list of the ids in use, so they are tried at random, as Kata does. The claim lasts as
    long as the open file.

    :raises Unavailable: no free one was found.
    """
    for _ in range(_CID_TRIES):
        cid = _FIRST_CID + int.from_bytes(os.urandom(8), "big") % (_LAST_CID - _FIRST_CID + 1)
        try:
            ioctl(fd, _SET_GUEST_CID, struct.pack("=Q", cid))
            return cid
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise Unavailable(f"the kernel gives no vsock context id: {exc.strerror}") from exc
    raise Unavailable(f"{_CID_TRIES} random vsock context ids were all in use")


# -- processes ------------------------------------------------------------------------------------
class _Process:
    """A backend's process, the lines it prints, and the pipe that ends it when this process dies."""

    def __init__(self, argv, undo, pass_fds=(), stdin=None):
        reader, writer = os.pipe()
        entry = undo.push("process", pid=0, start_time=0, name="vsock backend")
        try:
            self.child = child.spawn(argv, name="the vsock backend", pass_fds=pass_fds, stdin=stdin,
                                     stderr=writer, env={"PATH": os.environ.get("PATH", os.defpath)})
        except BaseException:
            os.close(reader)
            entry.forget()
            raise
        finally:
            os.close(writer)
        entry.update(pid=self.child.pid, start_time=self.child.start_time)
        make_nonblocking(reader)
        self.lines = deque(maxlen=_LINES)
        self._reader = green.spawn("vsock backend stderr", self._read, reader)

    def _read(self, fd):
        rest = b""
        try:
            while piece := nb_read(fd, 4096):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    self._take(line)
                if len(rest) > 4096:
                    self._take(rest)
                    rest = b""
        finally:
            os.close(fd)
        if rest:
            self._take(rest)

    def _take(self, line):
        text = line.decode(errors="replace").rstrip()
        self.lines.append(text)
        log.info("vsock: %s", text)

    def stop(self):
        # With a moment's grace the backend removes its sockets itself; `undo` does it in any case.
        self.child.stop(grace_s=0.5)
        self._reader.join(1)
        self._reader.kill()

    def failure(self):
        """An error that tells of its end, to raise."""
        self._reader.join(1)
        return HypervisorError(f"the vsock backend {self.child.ending()}"
                               + (f": {self.lines[-1]}" if self.lines else "")
                               ).attach("the vsock backend's last lines", "\n".join(self.lines))


def _start_builtin(place, undo):
    """Our own: it inherits sockets that listen already, so the VMM need not wait for it to start."""
    chardev_path, hybrid_path = os.path.join(place, _CHARDEV_NAME), os.path.join(place, _HYBRID_NAME)
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vhost_user_vsock", "__main__.py")
    with _listen(chardev_path, undo) as chardev, _listen(hybrid_path, undo) as hybrid:
        held, life = os.pipe()
        undo.call("the vsock backend's life line", os.close, life)
        fds = chardev.fileno(), hybrid.fileno()
        argv = [sys.executable, "-IS", program, "--guest-cid", str(_GUEST_CID),
                "--socket", chardev_path, "--uds-path", hybrid_path,
                "--socket-fd", str(fds[0]), "--uds-fd", str(fds[1]), "--until-eof", "0"]
        try:
            process = _Process(argv, undo, pass_fds=fds, stdin=held)
        finally:
            os.close(held)
    return _running(BUILTIN, chardev_path, hybrid_path, process, undo)


def _start_vhost_device(program, place, undo):
    chardev_path, hybrid_path = os.path.join(place, _CHARDEV_NAME), os.path.join(place, _HYBRID_NAME)
    for path in (chardev_path, hybrid_path):
        undo.push("file", path=path)
    argv = [program, "--guest-cid", str(_GUEST_CID), "--socket", chardev_path, "--uds-path", hybrid_path]
    process = _Process(argv, undo)
    backend = _running(VHOST_DEVICE, chardev_path, hybrid_path, process, undo)
    try:
        with green.deadline(_START_S, f"{program} to listen at {chardev_path}"):
            while not (_listens(chardev_path) and _listens(hybrid_path)):
                if backend.exited.is_set():
                    raise process.failure()
                gevent.sleep(0.005)
    except DeadlineExceeded as exc:
        raise exc.attach("the vsock backend's last lines", backend.log_text())
    return backend


def _running(kind, chardev_path, hybrid_path, process, undo):
    backend = VsockBackend(kind, _GUEST_CID, chardev_path=chardev_path, hybrid_path=hybrid_path,
                           process=process)
    undo.call("the vsock backend", backend.stop)
    return backend


def _which(program):
    """The path of an executable, None when there is none. (shutil's `which` costs 2 MiB of imports.)"""
    places = [""] if "/" in program else os.get_exec_path()
    return next((path for path in (os.path.join(place, program) for place in places)
                 if os.access(path, os.X_OK) and os.path.isfile(path)), None)


# -- sockets --------------------------------------------------------------------------------------
def _socket_dir(run_dir, undo):
    """`run_dir`, or a directory with a short name where that is too long for the sockets' paths."""
    longest = len(os.fsencode(os.path.join(run_dir, _HYBRID_NAME))) + _PORT_SUFFIX_BYTES
    if longest <= _SUN_PATH_BYTES:
        return run_dir
    place = _SHORT_PLACE + os.urandom(8).hex()
    undo.push("dir", path=place)
    try:
        os.mkdir(place, 0o700)
    except OSError as exc:
        raise HypervisorError(f"cannot make {place} for the vsock's sockets: {exc.strerror}") from exc
    return place


def _listen(path, undo):
    """A listening unix socket at `path`, for root alone."""
    undo.push("file", path=path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(128)
    except OSError as exc:
        listener.close()
        raise HypervisorError(f"cannot listen at {path}: {exc.strerror}") from exc
    return listener


def _listens(path):
    """Whether somebody listens at a unix socket, without connecting: that would count as the VMM."""
    listening = 1 << 16                 # __SO_ACCEPTCON in the column of flags
    with open("/proc/net/unix", "rb") as table:
        for line in table:
            fields = line.split(None, 7)
            if len(fields) == 8 and fields[7].rstrip(b"\n") == os.fsencode(path):
                return bool(int(fields[3], 16) & listening)
    return False
