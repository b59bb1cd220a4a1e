"""``start``: listen on the sandbox's socket, leave a daemon behind, print the address.

containerd waits for the end of this process and of its stdout, and takes all that is printed on
stdout *and stderr* for the address. So: nothing but the address on stdout, nothing on stderr unless
it fails, and no copy of either in the daemon.

The socket listens before the address is printed, so containerd may connect at once; its requests
wait in the backlog while the daemon, forked in place, imports what it needs. On the parent's side
only C builtins are imported (test/shim/test_start.py looks at sys.modules).
"""

import posix

from katashim.errors import FailedPrecondition, KatashimError
from katashim.shim import bootstrap, endpoint, interpreter, pod
from katashim.shim.flags import check_id

_STDIN_S = 0.25             # containerd has written before it waits for us; it may send nothing
_STDIN_NEEDED_S = 2         # when the command line says too little


class Settings:
    """What the daemon is told by whoever starts it.

    :ivar containerd_address: containerd's own socket, "" under CRI-O.
    :ivar ttrpc_address: where events go, "" for nowhere.
    :ivar socket_path: of the socket the daemon serves. :ivar socket_identity: see :func:`endpoint.identity`.
    :ivar foreground: True when a person runs it: stdin, stdout and stderr are theirs.
    """

    __slots__ = ("bundle", "containerd_address", "debug", "foreground", "id", "namespace",
                 "socket_identity", "socket_path", "ttrpc_address")

    def __init__(self, flags, bundle, socket_path, ttrpc_address, foreground):
        self.namespace, self.id, self.debug = flags.namespace, flags.id, flags.debug
        self.containerd_address = flags.address
        self.bundle, self.socket_path = bundle, socket_path
        self.ttrpc_address, self.foreground = ttrpc_address, foreground
        self.socket_identity = endpoint.identity(socket_path)

    @property
    def address(self):
        return "unix://" + self.socket_path


def start(flags):
    """Do the verb; returns the bytes to print.

    :raises KatashimError: and nothing is left: no process, no socket.
    """
    complete = flags.id and flags.namespace
    params = bootstrap.decode(bootstrap.read_stdin(_STDIN_S if complete else _STDIN_NEEDED_S), flags)
    if params is not None:
        bootstrap.complete(flags, params)
    check_id(flags.id, "id")
    check_id(flags.namespace, "namespace")
    bundle = bundle_of(flags)
    sandbox_id = pod.sandbox_of(flags.id, pod.annotations(bundle))
    path = endpoint.socket_path(endpoint.directory(params), flags.address, flags.namespace, sandbox_id)
    if sandbox_id == flags.id:
        _start_sandbox(flags, bundle, path, params)
    else:
        _join_sandbox(flags, bundle, path, sandbox_id)
    return bootstrap.answer("unix://" + path, params, _environ("MAX_SHIM_VERSION"))


def listen_for(flags):
    """The daemon in the foreground: ``(listening socket, Settings)``.

    :raises FailedPrecondition: a shim serves this sandbox already.
    """
    check_id(flags.id, "id")
    check_id(flags.namespace, "namespace")
    bundle = bundle_of(flags)
    path = endpoint.socket_path(endpoint.directory(), flags.address, flags.namespace, flags.id)
    interpreter.add_site_packages()
    listener = endpoint.listen(path)
    if listener is None:
        raise FailedPrecondition(f"a shim already serves sandbox {flags.id} on {path}")
    return listener, Settings(flags, bundle, path, _environ("TTRPC_ADDRESS"), foreground=True)


def bundle_of(flags):
    """The absolute path of the bundle: the flag's, else the working directory.

    :raises FailedPrecondition: the working directory is gone.
    """
    if flags.bundle.startswith("/"):
        return flags.bundle
    try:
        here = posix.getcwd()
    except OSError as exc:
        raise FailedPrecondition(f"the working directory, which is the bundle, is gone: {exc}") from exc
    return f"{here}/{flags.bundle}".rstrip("/")


def _join_sandbox(flags, bundle, path, sandbox_id):
    """A pod's further container: it is served by the shim of its sandbox, and that one must live."""
    if not endpoint.accepts(path):
        raise FailedPrecondition(f"container {flags.id} belongs to sandbox {sandbox_id}, "
                                 f"which has no running shim at {path}")
    _record(bundle, "address", "unix://" + path)


def _start_sandbox(flags, bundle, path, params):
    interpreter.add_site_packages()
    listener = endpoint.listen(path)
    if listener is None:                # our own shim, started by an earlier attempt, still serves
        _record(bundle, "address", "unix://" + path)
        return
    ttrpc_address = _environ("TTRPC_ADDRESS") or (params.ttrpc_address if params else "")
    settings = Settings(flags, bundle, path, ttrpc_address, foreground=False)
    try:
        _record(bundle, "address", settings.address)
        _fork_daemon(listener, settings)
    except BaseException:
        endpoint.remove(path, settings.socket_identity)
        raise


def _fork_daemon(listener, settings):
    try:
        pid = posix.fork()
    except OSError as exc:
        raise KatashimError(f"cannot fork the shim's daemon: {exc.strerror}") from exc
    if pid == 0:
        _be_daemon(listener, settings)
    try:
        _record(settings.bundle, "shim.pid", str(pid))
    except KatashimError:
        posix.kill(pid, 9)
        posix.waitpid(pid, 0)
        raise


def _be_daemon(listener, settings):
    """The child's side; never returns. Closing stdout is what lets containerd's read of it end."""
    status = 1
    try:
        posix.setsid()
        null = posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC)
        for fd in (0, 1, 2):
            posix.dup2(null, fd)
        from katashim.shim import daemon
        status = daemon.run(listener.detach(), settings)
    finally:
        posix._exit(status)


def _record(bundle, name, text):
    """Replace the file `name` in the bundle, whole and atomically."""
    path = f"{bundle}/{name}"
    fresh = f"{bundle}/.{name}.{posix.getpid()}"
    try:
        fd = posix.open(fresh, posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC, 0o644)
        try:
            posix.write(fd, text.encode())
        finally:
            posix.close(fd)
        posix.rename(fresh, path)
    except OSError as exc:
        raise KatashimError(f"cannot write {path}: {exc.strerror}") from exc


def _environ(name):
    return posix.environ.get(name.encode(), b"").decode()
