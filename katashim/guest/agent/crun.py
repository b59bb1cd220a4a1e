"""crun, the container runtime below the agent: create, start, exec, update, delete.

A program for each verb; what crun complains of comes back in its log file, because its stderr is the
container's. Called by container.py.
"""

import os
import time
from errno import ENXIO

from katashim.guest.agent import jsontext, mounts, programs, reaper, sockets
from katashim.guest.agent.rpcerror import INTERNAL, RpcError

STATE_DIR = "/run/crun"
_PATHS = ("/usr/bin/crun", "/usr/local/bin/crun", "/bin/crun")
_TIMEOUT_S = 60

# crun sets the OOM score for a container's init only; others inherit crun's own.
_WITH_OOM_SCORE = ("/bin/sh", "-c", 'echo "$0" >/proc/self/oom_score_adj && exec "$@"')


def create(cid, bundle, stdio, terminal, cgroups):
    """Set a container up to the point before its program runs; returns the reaper.Exit of its init.

    :param stdio: a process.Stdio; given its terminal when there is one.
    :param cgroups: whether the guest has a cgroup filesystem that crun can use.
    :raises RpcError: crun's words: a missing executable, an impossible mount, ...
    """
    return _launch(["create", "--bundle", bundle], cid, bundle, cid, stdio, terminal, cgroups)


def start(cid, init):
    """Let the program of a created container run.

    crun's `start` is one byte into a fifo that the init waits on. It may not have come to waiting yet, and
    one that has died never will, so this tries until either is clear.

    :param init: the reaper.Exit of the container's init. :raises RpcError: it does not wait.
    """
    fifo = f"{STATE_DIR}/{cid}/exec.fifo"
    limit = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except OSError as exc:
            if exc.errno != ENXIO or init.status is not None or time.monotonic() > limit:
                raise RpcError(INTERNAL, f"container {cid} does not wait to be started: {exc}") from exc
        init.wait(0.002)
    try:
        os.unlink(fifo)
        os.write(fd, b"\0")
    finally:
        os.close(fd)


def execute(cid, bundle, exec_id, process, stdio, cgroups):
    """Start another process in a container; returns its reaper.Exit.

    :param process: the runtime spec's process. :raises RpcError: crun's words.
    """
    path = f"{bundle}/exec-{exec_id}.json"
    score = process["oomScoreAdj"]
    with open(path, "w") as file:
        file.write(jsontext.dumps(process))
    try:
        return _launch(["exec", "--detach", "--process", path], cid, bundle, f"exec-{exec_id}", stdio,
                       process["terminal"], cgroups, [*_WITH_OOM_SCORE, str(score)] if score else [])
    finally:
        os.unlink(path)


def update(cid, bundle, resources):
    """Change a container's limits. :param resources: the runtime spec's. :raises RpcError: crun's words."""
    path = f"{bundle}/resources.json"
    with open(path, "w") as file:
        file.write(jsontext.dumps(resources))
    _run(["update", "--resources", path, cid])


def delete(cid, group):
    """Remove crun's state and the cgroup of a container whose processes have been killed.

    This is what ``crun delete`` does, without starting it.

    :param group: the container's cgroup.Cgroup, or None.
    """
    if group is not None:
        group.remove()
    mounts.remove_tree(f"{STATE_DIR}/{cid}")


def _program():
    for path in _PATHS:
        if os.path.exists(path):
            return path
    raise RpcError(INTERNAL, "there is no crun in this guest")


def _run(arguments):
    done = programs.run([_program(), "--root", STATE_DIR, *arguments], timeout_s=_TIMEOUT_S)
    if done.status != 0:
        raise RpcError(INTERNAL, done.text() or f"crun {arguments[0]} ended with {done.status}")


def _launch(verb, cid, bundle, name, stdio, terminal, cgroups, wrapper=()):
    """Run ``crun create`` or ``crun exec`` with the process's stdio; returns its reaper.Exit.

    :param wrapper: a program, and its first arguments, that executes what follows them.
    """
    log_path, pid_path = f"{bundle}/{name}.log", f"{bundle}/{name}.pid"
    argv = [*wrapper, _program(), "--root", STATE_DIR, "--log", log_path,
            "--cgroup-manager", "cgroupfs" if cgroups else "disabled", *verb, "--pid-file", pid_path]
    listener = None
    if terminal:
        console = f"{bundle}/{name}.sock"
        listener = sockets.listen_unix(console, 1)
        argv += ["--console-socket", console]
    with reaper.starting() as children:
        runtime = children.adopt(programs.start([*argv, cid], *stdio.child))
        if listener is None:
            stdio.started()
        else:
            _take_terminal(listener, console, runtime, stdio)
        status = runtime.wait(_TIMEOUT_S)
        if status is None:
            os.kill(runtime.pid, 9)
            raise RpcError(INTERNAL, f"waited {_TIMEOUT_S} s for crun {verb[0]} of {name}")
        if status != 0:
            raise RpcError(INTERNAL, _last_words(log_path) or f"crun {verb[0]} ended with {status}")
        with open(pid_path) as file:
            return children.adopt(int(file.read()))


def _take_terminal(listener, path, runtime, stdio):
    """Receive the terminal that crun made; nothing is received when crun fails before it makes one."""
    import select
    try:
        poller = select.poll()
        poller.register(listener.fileno(), select.POLLIN)
        poller.register(runtime.fd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(_TIMEOUT_S * 1000)}
        if listener.fileno() in ready:
            connection = sockets.accept(listener)
            try:
                stdio.become_terminal(sockets.receive_fd(connection))
            finally:
                connection.close()
    finally:
        listener.close()
        os.unlink(path)


def _last_words(path):
    try:
        with open(path, errors="replace") as file:
            return file.read().strip().rpartition("\n")[2]
    except FileNotFoundError:
        return ""
