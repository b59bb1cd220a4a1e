"""virtiofsd, the process behind a virtio-fs device: found, told apart, started, watched.

There are two programs of this name. The one in Rust (project virtio-fs, 1.x) takes ``--shared-dir``;
the one in C (QEMU up to 7.2) takes ``-o source=``. Which one it is, its ``--help`` says. Both take a
listening socket by ``--fd``: it is bound here, so a VMM that connects early waits in its backlog, and
one that connects to a daemon that died is refused instead of left hanging.

Called by katashim.resources.sharefs.
"""

import logging
import os
import socket
from collections import deque
from typing import NamedTuple

from gevent.event import Event
from gevent.os import make_nonblocking, nb_read

from katashim import child, green
from katashim.errors import ConfigError, HypervisorError, InvalidArgument, NotFound

log = logging.getLogger(__name__)

PLACES = (
    "/usr/libexec/virtiofsd",           # the Rust one: Debian 13, Fedora, RHEL 9
    "/usr/lib/virtiofsd",               # Arch
    "/opt/kata/libexec/virtiofsd",      # Kata's release tarball
    "/usr/lib/qemu/virtiofsd",          # the C one: Debian 11 and 12
    "/usr/libexec/kata-qemu/virtiofsd",
)
RUST, C = "rust", "c"

_READY = "Waiting for vhost-user socket connection"
_START_S = 10               # both flavours are ready within 10 ms on an idle machine
_SUN_PATH_BYTES = 107       # of unix(7)'s sun_path, without the final NUL
_LINES = 40                 # of its stderr, kept for errors
_LAST_WORDS = 4             # of them go into an error's message: the Rust one ends with its usage

_flavours = {}              # (path, mtime_ns) -> RUST or C


class Settings(NamedTuple):
    """How a daemon serves a directory."""

    shared_dir: str
    cache: str = "never"        # "never", "metadata", "auto", "always"
    xattr: bool = False
    extra_args: tuple = ()


# -- which program --------------------------------------------------------------------------------
def find(configured=""):
    """The path of the program to run: the configured one, else the first that is in a usual place.

    :raises NotFound: there is none; names the places.
    """
    if configured:
        if os.access(configured, os.X_OK):
            return configured
        raise NotFound(f"virtio_fs_daemon = {configured}: no such program")
    for path in PLACES:
        if os.access(path, os.X_OK):
            return path
    raise NotFound(f"no virtiofsd: install it, set virtio_fs_daemon, or set shared_fs = none; looked at "
                   f"{', '.join(PLACES)}")


def flavour(path):
    """RUST or C, found out by asking the program once for each version of its file.

    :raises ConfigError: it is neither.
    """
    key = path, os.stat(path).st_mtime_ns
    if key not in _flavours:
        _flavours[key] = _flavour_of_help(path, _help(path))
    return _flavours[key]


def _flavour_of_help(path, text):
    if b"--shared-dir" in text:
        return RUST
    if b"-o source=" in text:
        return C
    raise ConfigError(f"{path} is no virtiofsd that katashim knows: its --help mentions neither "
                      "--shared-dir nor -o source=")


def _help(path):
    reader, writer = os.pipe()
    try:
        asked = child.spawn([path, "--help"], name="virtiofsd --help", stdout=writer, stderr=writer)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    try:
        make_nonblocking(reader)
        text = b""
        with green.deadline(_START_S, f"{path} --help to answer"):
            while piece := nb_read(reader, 65536):
                text += piece
        return text
    finally:
        os.close(reader)
        asked.stop()


def command(path, kind, fd, settings):
    """The command line of a daemon of flavour `kind` that takes its connection from the socket `fd`.

    :raises ConfigError: this flavour cannot do what the settings say.
    """
    extra = list(settings.extra_args)
    announced = any("announce" in word for word in extra)
    if kind == RUST:
        argv = [path, f"--fd={fd}", f"--shared-dir={settings.shared_dir}", f"--cache={settings.cache}"]
        argv += [] if announced else ["--announce-submounts"]
        argv += ["--xattr"] if settings.xattr else []
        return argv + extra
    if settings.cache == "metadata":
        raise ConfigError(f"virtio_fs_cache = metadata: {path} is QEMU's virtiofsd, which has never, auto "
                          "and always")
    options = [f"source={settings.shared_dir}",
               f"cache={'none' if settings.cache == 'never' else settings.cache}"]
    # Else files of two filesystems can have the same st_dev and st_ino in the guest.
    options += [] if announced else ["announce_submounts"]
    options += ["xattr"] if settings.xattr else []
    argv = [path, f"--fd={fd}", "-f"]
    for option in options:
        argv += ["-o", option]
    return argv + extra


def _is_quiet(extra_args):
    """Whether the user's own arguments may suppress the line that tells of readiness."""
    return any(word in argument for argument in extra_args for word in ("log-level", "log_level", "syslog"))


# -- the process ----------------------------------------------------------------------------------
class Virtiofsd:
    """A running daemon; made by :func:`start`.

    It ends by itself when the VMM closes the connection.

    :ivar exited: gevent Event, set once the process has ended.
    """

    def __init__(self, process, path, stderr):
        self.path = path
        self._process = process
        self._lines = deque(maxlen=_LINES)
        self._news = Event()            # it is ready, or it is dead
        self._reader = green.spawn("virtiofsd stderr", self._read, stderr)
        process.exited.rawlink(lambda _: self._news.set())

    @property
    def exited(self):
        return self._process.exited

    def pids(self):
        """Host pids: the daemon's, and its worker's where it serves from a namespace of its own."""
        if self._process.returncode is not None:
            return []
        return [self._process.pid, *_children(self._process.pid)]

    def ending(self):
        """How it ended and its last words, one string: "exited with status 1: unknown option"."""
        self._reader.join(1)
        words = [line for line in self._lines if line and _READY not in line][-_LAST_WORDS:]
        return f"{self._process.ending()}: {'; '.join(words) or 'it said nothing'}"

    def log_text(self):
        """The last lines that it printed."""
        return "\n".join(self._lines)

    def wait_ready(self, timeout_s=_START_S):
        """Wait until it serves its socket.

        :raises HypervisorError: it ended. :raises DeadlineExceeded: it did neither.
        """
        with green.deadline(timeout_s, f"{self.path} to serve its socket"):
            self._news.wait()
        if self._process.returncode is not None:
            raise self.failure()

    def failure(self):
        """An error that tells of its end, to raise."""
        return HypervisorError(f"virtiofsd ({self.path}) {self.ending()}").attach(
            "virtiofsd's last lines", self.log_text())

    def stop(self):
        """End it and reap it, its worker too. No error when it has ended."""
        workers = [(pid, child.start_time(pid)) for pid in _children(self._process.pid)]
        self._process.stop()
        for pid, started in workers:
            if started is not None:
                green.in_thread(child.kill_identity, pid, started, what=f"virtiofsd's worker {pid} to end")
        self._reader.join(1)
        self._reader.kill()

    def _read(self, fd):
        rest = b""
        try:
            while piece := nb_read(fd, 65536):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    self._take(line)
            if rest:
                self._take(rest)
        finally:
            os.close(fd)

    def _take(self, line):
        text = line.decode(errors="replace").strip()
        self._lines.append(text)
        log.debug("virtiofsd: %s", text)
        if _READY in text:
            self._news.set()


def start(path, socket_path, settings, undo):
    """Start the virtiofsd at `path`, serving `settings.shared_dir` to whom connects to `socket_path`.

    :param undo: gets the socket's file and the process.
    :returns: :class:`Virtiofsd`, serving.
    :raises HypervisorError: it ended at once; with its words.
    """
    kind = flavour(path)
    undo.push("file", path=socket_path)
    with _listen(socket_path) as listener:
        argv = command(path, kind, listener.fileno(), settings)
        log.debug("starting %s", " ".join(argv))
        reader, writer = os.pipe()
        entry = undo.push("process", pid=0, start_time=0, name="virtiofsd")
        try:
            process = child.spawn(argv, name="virtiofsd", env={"PATH": os.environ.get("PATH", os.defpath)},
                                  pass_fds=(listener.fileno(),), stderr=writer)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
    make_nonblocking(reader)
    daemon = Virtiofsd(process, path, reader)
    undo.call("virtiofsd", daemon.stop)
    entry.update(pid=process.pid, start_time=process.start_time)
    if not _is_quiet(settings.extra_args):
        daemon.wait_ready()
    return daemon


def _listen(path):
    """A listening socket at `path`, for root alone."""
    if len(os.fsencode(path)) > _SUN_PATH_BYTES:
        raise InvalidArgument(f"the socket path {path} has {len(path)} bytes, a unix socket takes at most "
                              f"{_SUN_PATH_BYTES}: use a shorter sandbox id")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(1)
        os.set_blocking(listener.fileno(), True)    # a cooperative socket is not, and virtiofsd accepts once
    except OSError as exc:
        listener.close()
        raise HypervisorError(f"cannot listen at {path}: {exc.strerror}") from exc
    return listener


def _children(pid):
    """Pids of the children of all threads of `pid`."""
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as children:
                found += map(int, children.read().split())
    except (FileNotFoundError, ProcessLookupError):
        pass                # it ended meanwhile
    return found
