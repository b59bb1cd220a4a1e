"""``delete``: what containerd executes when a shim is gone, to have its remains removed.

Called after a shim died, and also in a race with a shim that ends in good order, and once for each
container of a pod, at the same time. So it is idempotent, takes turns with itself, and leaves a
sandbox alone that a living shim owns. What is to be removed stands in the sandbox's journal
(katashim.undo); nothing is guessed from names. Answers a Task ``DeleteResponse`` with status 137.

Plain: no gevent, no protobuf. containerd gives it about 5 s and then kills it, so the work is done by
a child process, and the answer is printed in time even when the kernel sits on an unmount.
"""

import fcntl
import os
import select
import sys
import time

from katashim import child, state, undo
from katashim.errors import DeadlineExceeded, KatashimError
from katashim.resources import mounts
from katashim.shim import endpoint, interpreter, pod, wire
from katashim.shim.flags import check_id
from katashim.shim.start import bundle_of

EXIT_STATUS = 137           # 128 + SIGKILL
_ANSWER_S = 4.0             # containerd's "io.containerd.timeout.shim.cleanup" is 5 s
_FAREWELL_S = 2.0           # for a shim that has removed its socket and is about to exit
_TURN_S = 30.0              # for another `delete` of the same sandbox
_JOURNAL = "journal"


def delete(flags):
    """Do the verb; returns the bytes to print. What could not be removed is told on stderr."""
    check_id(flags.id, "id")
    check_id(flags.namespace, "namespace")
    sys.path.extend(interpreter.site_packages())
    problems = _in_child(_ANSWER_S, _clean_up, flags)
    if problems:
        os.write(2, problems)
    return wire.integer(2, EXIT_STATUS) + wire.timestamp(3, time.time_ns())


def _clean_up(flags):
    """Remove what is left of the container; returns a list of problems, in words."""
    problems = []
    bundle = os.path.realpath(bundle_of(flags))
    sandbox_id = _sandbox_id(flags, bundle, problems)
    socket = _socket_of(flags, bundle, sandbox_id)
    problems += release_sandbox(sandbox_id, socket)
    try:
        mounts.unmount_below(os.path.join(bundle, "rootfs"))
    except (KatashimError, OSError) as exc:
        problems.append(f"unmounting the rootfs: {exc}")
    if sandbox_id == flags.id and not endpoint.accepts(socket):
        endpoint.remove(socket, endpoint.identity(socket))
    return problems


def release_sandbox(sandbox_id, socket):
    """Release all that the journal of a dead shim's sandbox holds, then its directory.

    :param socket: path of the sandbox's socket: a shim that still answers there is alive.
    :returns: problems, in words; empty too when there is nothing to release or a shim owns it.
    """
    directory = state.run_dir(sandbox_id)
    try:
        turn = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        _take_turn(turn, directory)
        return _replay(directory, socket)
    except (KatashimError, OSError) as exc:
        return [str(exc)]
    finally:
        os.close(turn)


def _replay(directory, socket):
    from katashim.resources.releases import RELEASES
    journal = os.path.join(directory, _JOURNAL)
    try:
        header, _ = undo.read(journal)
    except FileNotFoundError:       # another `delete` was faster, or it is none of katashim's
        return []
    pid, started = header.get("pid"), header.get("start_time")
    if _lives_on(pid, started, socket):
        return [f"the shim of the sandbox lives (pid {pid}): {directory} is left to it"]
    failed = undo.replay(journal, RELEASES)
    if failed:
        return [f"{what}: {error}" for what, error in failed]
    mounts.remove_tree(directory)
    return []


def _lives_on(pid, started, socket):
    """Whether the shim lives and will go on living: one whose socket is gone is about to exit."""
    if pid is None or not child.is_alive(pid, started):
        return False
    return endpoint.accepts(socket) or not child.wait_gone(pid, started, _FAREWELL_S)


def _sandbox_id(flags, bundle, problems):
    try:
        return pod.sandbox_of(flags.id, pod.annotations(bundle))
    except KatashimError as exc:
        problems.append(f"taking {flags.id} for a sandbox: {exc}")
        return flags.id


def _socket_of(flags, bundle, sandbox_id):
    """The sandbox's socket: as `start` recorded it in the bundle, else as it would compute it now."""
    computed = endpoint.socket_path(endpoint.directory(), flags.address, flags.namespace, sandbox_id)
    try:
        with open(os.path.join(bundle, "address")) as file:
            recorded = file.read().strip().removeprefix("unix://")
    except FileNotFoundError:
        return computed
    # Only a file of that name: what stands in the bundle must not make us remove anything else.
    return recorded if os.path.basename(recorded) == os.path.basename(computed) else computed


def _take_turn(fd, directory):
    end = time.monotonic() + _TURN_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise DeadlineExceeded(
                    f"nothing after {_TURN_S:g} s while waiting for the lock on {directory}") from None
            time.sleep(0.01)


def _in_child(seconds, work, *args):
    """Do `work` in a child process and return its problems as text (bytes) within `seconds`.

    A child that needs longer is left to finish alone; it holds none of our descriptors, for containerd
    waits until the last of them is closed.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_child(theirs, work, args)
    os.close(theirs)
    try:
        return _read_problems(ours, pid, time.monotonic() + seconds)
    finally:
        os.close(ours)


def _read_problems(pipe, pid, end):
    text = b""
    while True:
        if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            return text + b"not finished yet: goes on in the background\n"
        chunk = os.read(pipe, 65536)
        if not chunk:
            os.waitpid(pid, 0)
            return text
        text += chunk


def _be_child(pipe, work, args):
    status = 1
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.write(pipe, "".join(f"{problem}\n" for problem in work(*args)).encode())
        status = 0
    except KatashimError as exc:
        os.write(pipe, f"{exc.full_text()}\n".encode())
    except Exception:       # noqa: BLE001  the outermost frame of a process: after this there is only exit
        import traceback
        os.write(pipe, traceback.format_exc().encode())
    finally:
        os._exit(status)
