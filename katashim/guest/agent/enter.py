"""exec without crun: enter a container's namespaces, fork, take the process's identity, execute.

``crun exec`` costs 60 ms in an emulated guest, this a third of it. It does what crun does for the spec's
process: user, groups, capabilities, limits, no_new_privs, OOM score, working directory, environment,
terminal, cgroup. A container with a seccomp filter or a user namespace is left to crun (:func:`can_do`).
Called by container.py.

There is one fork: the calling thread says in which pid namespace its children are to be born (setns(2) with
CLONE_NEWPID concerns nothing else, and only this thread), forks, and takes that back. The child
joins the cgroup and the other namespaces itself. A pipe brings back the text of what went wrong in it;
executing the program closes it.

Between fork and exec only this thread exists, and other threads' locks may be held for ever: what runs there
takes no lock and logs nothing.
"""

import fcntl
import os
import struct
from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal
from _socket import AF_UNIX, SOCK_STREAM, SOL_SOCKET, socketpair

from katashim.guest.agent import linux, passwd, reaper, sockets
from katashim.guest.agent.capability import Capabilities
from katashim.guest.agent.rpcerror import INTERNAL, RpcError

_NAMESPACES = linux.CLONE_NEWNS | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS | linux.CLONE_NEWCGROUP
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TIOCSCTTY, _TIOCSWINSZ, _TIOCSPTLCK, _TIOCGPTPEER = 0x540E, 0x5414, 0x40045431, 0x5441
_INFINITY = (1 << 64) - 1


class _Failure(Exception):
    """Something that keeps the process from being started, in words for the caller."""


def can_do(oci):
    """Whether a process can be started here in the container of the spec `oci`."""
    kinds = {namespace["type"] for namespace in oci["linux"]["namespaces"]}
    return "seccomp" not in oci["linux"] and {"mount", "pid"} <= kinds and "user" not in kinds


def execute(init_pid, process, stdio):
    """Start another process in a container; returns its reaper.Exit.

    :param init_pid: of the container's init. :param process: the runtime spec's process.
    :param stdio: a process.Stdio, given its terminal when there is one.
    :raises RpcError: it cannot be; says why, a program that is not there in crun's words.
    """
    program = _Program(process)
    cgroups = _cgroup_files(init_pid)
    container = os.pidfd_open(init_pid)
    terminal = socketpair(AF_UNIX, SOCK_STREAM) if program.terminal else None
    reading, report = os.pipe2(os.O_CLOEXEC)
    try:
        with reaper.starting() as children:
            end = children.adopt(_fork_into(container, lambda: _become(
                program, container, cgroups, stdio.child, terminal, report)))
        os.close(report)
        report = -1
        failure = _read_all(reading)
        if failure:
            end.wait(5)
            raise RpcError(INTERNAL, failure.decode(errors="replace"))
        if terminal is not None:
            stdio.become_terminal(sockets.receive_fd(terminal[0]))
        else:
            stdio.started()
        return end
    finally:
        os.close(container)
        for fd in (reading, report):
            if fd >= 0:
                os.close(fd)
        for end_of_pair in terminal or ():
            end_of_pair.close()


def _fork_into(container, run):
    """Fork a child into the pid namespace of the process behind the pidfd `container`; returns its pid.

    :param run: what the child does; never returns.
    """
    home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.setns(container, linux.CLONE_NEWPID)
        try:
            pid = os.fork()
            if pid == 0:
                run()
        finally:
            linux.setns(home, linux.CLONE_NEWPID)
    finally:
        os.close(home)
    return pid


def _read_all(fd):
    data = b""
    while piece := os.read(fd, 4096):
        data += piece
    return data


class _Program:
    """What to execute, worked out before the forks as far as it can be."""

    def __init__(self, process):
        if not process["args"]:
            raise RpcError(INTERNAL, "the process has no args")
        user = process["user"]
        self.args = process["args"]
        self.environment = dict(word.partition("=")[::2] for word in process["env"])
        self.directory, self.terminal = process["cwd"], process["terminal"]
        self.uid, self.gid, self.groups = user["uid"], user["gid"], user.get("additionalGids", [])
        self.capabilities = Capabilities(process.get("capabilities", {}))
        self.no_new_privileges, self.oom_score = process["noNewPrivileges"], process["oomScoreAdj"]
        size = process.get("consoleSize", {"height": 0, "width": 0})
        self.size = struct.pack("<HHHH", size["height"], size["width"], 0, 0)
        self.limits = _limits(process["rlimits"])


def _limits(rlimits):
    if not rlimits:
        return []
    import resource
    known = [(getattr(resource, item["type"], None), item) for item in rlimits]
    unknown = [item["type"] for number, item in known if number is None]
    if unknown:
        raise RpcError(INTERNAL, f"unknown limit {unknown[0]}")
    return [(number, tuple(-1 if item[name] == _INFINITY else item[name] for name in ("soft", "hard")))
            for number, item in known]


def _cgroup_files(pid):
    """The ``cgroup.procs`` of every cgroup that process `pid` is in."""
    files = []
    with open(f"/proc/{pid}/cgroup") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            hierarchy = controllers.removeprefix("name=")       # none for cgroup2
            found = f"/sys/fs/cgroup/{hierarchy}".rstrip("/") + f"{path}/cgroup.procs"
            if os.path.exists(found):
                files.append(found)
    return files


# -- after the fork -------------------------------------------------------------------------------

def _become(program, container, cgroups, fds, terminal, report):
    """The process: never returns."""
    try:
        for path in cgroups:
            _write(path, "0")
        _write("/proc/self/oom_score_adj", str(program.oom_score))
        linux.setns(container, _NAMESPACES)
        os.setsid()
        if terminal is not None:
            fds = _open_terminal(program, terminal[1])
        _place(fds)
        for number, values in program.limits:
            import resource
            resource.setrlimit(number, values)
        _take_identity(program)
        _execute(program)
    except _Failure as exc:
        os.write(report, str(exc).encode(errors="replace"))
    except BaseException as exc:  # noqa: BLE001  whatever it is, it must not run the agent's code on
        os.write(report, f"starting {program.args[0]}: {exc}".encode(errors="replace"))
    finally:
        os._exit(1)


def _open_terminal(program, channel):
    """Make a terminal in the container, send its master side to the agent; returns the fds for 0 to 2."""
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    fcntl.ioctl(slave, _TIOCSWINSZ, program.size)
    os.fchown(slave, program.uid, -1)
    fcntl.ioctl(slave, _TIOCSCTTY, 0)
    channel.sendmsg([b"\0"], [(SOL_SOCKET, sockets.SCM_RIGHTS, struct.pack("i", master))])
    return slave, slave, slave


def _place(fds):
    """Put `fds` at 0 to 2. The others close themselves when the program is executed."""
    fds = [os.dup(fd) if fd < 3 else fd for fd in fds]
    for number, fd in enumerate(fds):
        os.dup2(fd, number)


def _take_identity(program):
    for number in (SIGPIPE, SIGXFSZ):       # Python ignores them, and a program would inherit that
        signal(number, SIG_DFL)
    os.umask(0o022)
    if "HOME" not in program.environment:
        program.environment["HOME"] = passwd.home("/", program.uid)
    program.capabilities.limit()
    os.setgroups(program.groups)
    os.setresgid(program.gid, program.gid, program.gid)
    entered = _try_directory(program.directory)
    os.setresuid(program.uid, program.uid, program.uid)
    if not entered:
        _change_directory(program.directory)
    program.capabilities.apply()
    if program.no_new_privileges:
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)


def _try_directory(path):
    """Enter `path` as root, which a user may not be able to; on a network share it may be the other way."""
    try:
        os.chdir(path)
    except PermissionError:
        return False
    except OSError as exc:
        raise _Failure(f"chdir to {path}: {exc.strerror}") from exc
    return True


def _change_directory(path):
    try:
        os.chdir(path)
    except OSError as exc:
        raise _Failure(f"chdir to {path}: {exc.strerror}") from exc


def _execute(program):
    name = program.args[0]
    path = name if "/" in name else _look_up(name, program.environment.get("PATH", _DEFAULT_PATH))
    try:
        os.execve(path, program.args, program.environment)
    except FileNotFoundError as exc:
        raise _Failure(f"executable file `{name}` not found in $PATH: {exc.strerror}") from exc
    except OSError as exc:
        raise _Failure(f"exec `{name}`: {exc.strerror}") from exc


def _look_up(name, search):
    for directory in search.split(":"):
        path = f"{directory or '.'}/{name}"
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    raise _Failure(f"executable file `{name}` not found in $PATH: No such file or directory")


def _write(path, text):
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
