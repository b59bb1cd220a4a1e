"""The host's control groups as directories: cgroups(7), v1 and v2, and both at once.

A *path* here is what the OCI spec calls it, "kubepods/pod1/abc" without a leading slash, and means the
directory of that name in every hierarchy that has controllers: one under v2, up to a dozen under v1, all
of them on a hybrid host.

Directories that katashim has made carry a mark (an extended attribute), so that a parent made on the
way, which other sandboxes share, goes with the last of them, and one of the user's or kubelet's never.

Plain: no gevent. Called by katashim.resources.cgroup and by the undo stack (kind ``cgroup``).
"""

import errno
import os
import time
from typing import NamedTuple

from katashim.errors import FailedPrecondition, InvalidArgument, Unavailable
from katashim.resources import mounts

_CONTROLLERS = frozenset((
    "cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "net_cls", "blkio", "perf_event",
    "net_prio", "hugetlb", "pids", "rdma", "misc"))
_MARK = "trusted.katashim"
_MAKE_TRIES = 10
_RETRY_S = 0.01


class Hierarchy(NamedTuple):
    """A mounted tree of cgroups."""

    root: str                   # mount point
    version: int                # 1 or 2
    controllers: frozenset      # names

    def directory(self, path):
        """Where the cgroup `path` is in this tree."""
        return f"{self.root}/{path}"


class Figures(NamedTuple):
    """What a cgroup's processes use. None = this host does not count it."""

    memory_bytes: int = None
    memory_peak_bytes: int = None
    cpu_ns: int = None
    tasks: int = None


def hierarchies(table=None):
    """The hierarchies with controllers, of the mount table (or of `table`, its entries).

    v1's named trees (systemd's own) are left out, and so is a v2 tree without controllers beside v1
    ones, as systemd mounts it for its own purposes on hybrid hosts.

    :raises FailedPrecondition: none is mounted.
    """
    found = {}
    for entry in mounts.table() if table is None else table:
        if entry.fstype == "cgroup":
            hierarchy = Hierarchy(entry.target, 1, _CONTROLLERS.intersection(entry.super_options))
        elif entry.fstype == "cgroup2":
            hierarchy = Hierarchy(entry.target, 2, _v2_controllers(entry.target))
        else:
            continue
        # The same tree may be mounted again elsewhere, in a chroot for one; the first is the host's.
        found.setdefault(entry.device, hierarchy)
    if not found:
        raise FailedPrecondition("no control groups are mounted on this host")
    with_controllers = [hierarchy for hierarchy in found.values() if hierarchy.controllers]
    return with_controllers or [hierarchy for hierarchy in found.values() if hierarchy.version == 2]


def check_path(path):
    """Bring a path into the normal form, "a/b/c".

    :raises InvalidArgument: it leads upwards ("..") or has characters no name can have.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InvalidArgument(f"the cgroup path {path!r} leads upwards")
    if "\0" in path or "\n" in path:
        raise InvalidArgument(f"the cgroup path {path!r} has characters that no name can have")
    return "/".join(parts)


def create(path):
    """Make the cgroup `path` in every hierarchy, ready for processes; one that exists is no error.

    :raises FailedPrecondition: the kernel refuses; names the directory.
    """
    for hierarchy in hierarchies():
        for _ in range(_MAKE_TRIES):
            try:
                _make(hierarchy, path)
                break
            except FileNotFoundError:
                continue        # another sandbox has just removed a parent that it shared with us
            except OSError as exc:
                raise FailedPrecondition(
                    f"cannot make the cgroup {hierarchy.directory(path)}: {exc.strerror}") from exc
        else:
            raise Unavailable(f"the parents of the cgroup {hierarchy.directory(path)} keep being removed")


def add_process(path, pid, version=None):
    """Move the process `pid`, with all of its threads, into `path`: in all hierarchies, or those of v1 or 2.

    :raises FailedPrecondition: the kernel refuses, or there is no such process.
    """
    for hierarchy in hierarchies():
        if version in (None, hierarchy.version):
            _add(hierarchy, path, "cgroup.procs", pid)


def add_thread(path, thread):
    """Move one thread into `path` in the v1 hierarchies; v2 knows no threads apart from their process."""
    for hierarchy in hierarchies():
        if hierarchy.version == 1:
            _add(hierarchy, path, "tasks", thread)


def set_cpuset(path, cpus, mems):
    """Confine `path` to CPUs and memory nodes, both in the kernel's list form ("0-3,7"); "" = the parent's.

    :returns: False when no hierarchy has the controller.
    :raises InvalidArgument: the host does not have those CPUs or nodes.
    """
    for hierarchy in hierarchies():
        directory = hierarchy.directory(path)
        if os.path.exists(f"{directory}/cpuset.cpus"):
            _confine(hierarchy, directory, "cpuset.cpus", cpus)
            _confine(hierarchy, directory, "cpuset.mems", mems)
            return True
    return False


def figures(path):
    """What the processes in `path` use: :class:`Figures`. Reads a few files; may take a millisecond."""
    found = {}
    for hierarchy in hierarchies():
        read = _v2_figures if hierarchy.version == 2 else _v1_figures
        for key, value in read(hierarchy.directory(path)).items():
            if value is not None:
                found.setdefault(key, value)
    return Figures(**found)


def missing(path):
    """The directories of the cgroup `path`, one for each hierarchy, that do not exist yet."""
    directories = [hierarchy.directory(check_path(path)) for hierarchy in hierarchies()]
    return [directory for directory in directories if not os.path.exists(directory)]


def remove_path(path, wait_s=5.0, new=()):
    """Remove the cgroup `path` from every hierarchy, and its marked parents that it leaves empty.

    This process itself is moved out first; others that are about to die are waited for. What katashim
    has not made stays. No error when there is nothing.

    :param wait_s: seconds for all hierarchies together.
    :param new: directories that were :func:`missing` before katashim made them: a maker that was killed
        in the middle had no time to mark its last one.
    :raises Unavailable: processes are in it still; names them.
    :raises FailedPrecondition: the kernel refuses.
    """
    path = check_path(path)
    end = time.monotonic() + wait_s
    for hierarchy in hierarchies() if path else ():
        directory = hierarchy.directory(path)
        _leave(hierarchy, path)
        if directory in new or _is_marked(directory):
            _remove_when_empty(directory, end)
        parent = os.path.dirname(directory)
        while parent != hierarchy.root and not os.path.exists(directory) and _is_marked(parent):
            if not _try_rmdir(parent):
                break           # another sandbox is below it
            directory, parent = parent, os.path.dirname(parent)


# -- making -----------------------------------------------------------------------------------------

def _make(hierarchy, path):
    directory = hierarchy.root
    for name in path.split("/"):
        if hierarchy.version == 2:
            _delegate(hierarchy, directory)
        directory = f"{directory}/{name}"
        try:
            os.mkdir(directory, 0o755)
            _mark(directory)
        except FileExistsError:
            pass
        if "cpuset" in hierarchy.controllers and hierarchy.version == 1:
            _inherit_cpuset(directory)


def _delegate(hierarchy, directory):
    """Make all controllers available below a v2 cgroup, as far as the kernel lets us.

    A cgroup with processes of its own, other than the root, cannot pass some of them on; then the cgroups
    below do without, and the figures of those controllers are missing.
    """
    control = f"{directory}/cgroup.subtree_control"
    missing = set(_read(f"{directory}/cgroup.controllers").split()) - set(_read(control).split())
    for controller in sorted(missing):
        try:
            _write(control, f"+{controller}")
        except OSError as exc:
            if exc.errno not in (errno.EBUSY, errno.EOPNOTSUPP, errno.ENOENT, errno.EINVAL):
                raise


def _inherit_cpuset(directory):
    """A new v1 cpuset is empty and takes no process until it has CPUs and memory nodes."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not _read(f"{directory}/{name}"):
            _write(f"{directory}/{name}", _read(f"{os.path.dirname(directory)}/{name}"))


def _confine(hierarchy, directory, name, value):
    """Set one file of a cpuset. A cgroup with processes cannot be set back to empty, not under v2 either,
    so what is confined no longer is given all that its parent has."""
    if not value:
        if not _read(f"{directory}/{name}"):
            return
        effective = name if hierarchy.version == 1 else f"{name}.effective"
        value = _read(f"{os.path.dirname(directory)}/{effective}")
    try:
        _write(f"{directory}/{name}", value)
    except OSError as exc:
        raise InvalidArgument(f"cannot set {name} of {directory} to {value!r}: {exc.strerror}") from exc


def _mark(directory):
    try:
        os.setxattr(directory, _MARK, b"1")
    except OSError as exc:
        # In a user namespace there is no such attribute. Then the directory stays behind, which is better
        # than to remove one of somebody else.
        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise


def _is_marked(directory):
    try:
        os.getxattr(directory, _MARK)
        return True
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.ENOENT, errno.EOPNOTSUPP):
            return False
        raise


# -- moving and removing ----------------------------------------------------------------------------

def _add(hierarchy, path, name, number):
    directory = hierarchy.directory(path)
    try:
        _write(f"{directory}/{name}", str(number))
    except OSError as exc:
        raise FailedPrecondition(f"cannot put {number} into the cgroup {directory}: {exc.strerror}") from exc


def _processes(directory):
    try:
        return [int(pid) for pid in _read(f"{directory}/cgroup.procs").split()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        if exc.errno == errno.ENODEV:       # removed while it was read
            return []
        raise


def _leave(hierarchy, path):
    """Move this process out of `path`: into the root, or the next cgroup below it that takes processes."""
    own = os.getpid()
    if own not in _processes(hierarchy.directory(path)):
        return
    refusal = None
    parts = path.split("/")
    for depth in range(len(parts)):
        try:
            return _write(f"{hierarchy.directory('/'.join(parts[:depth]))}/cgroup.procs", str(own))
        except OSError as exc:
            refusal = exc
    raise FailedPrecondition(
        f"cannot leave the cgroup {hierarchy.directory(path)}: {refusal.strerror}") from refusal


def _remove_when_empty(directory, end):
    while not _try_rmdir(directory):
        if time.monotonic() > end:
            raise Unavailable(f"the cgroup {directory} cannot be removed: it holds the processes "
                              f"{_processes(directory)} and the cgroups {_children(directory)}")
        time.sleep(_RETRY_S)


def _try_rmdir(directory):
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError as exc:
        if exc.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise FailedPrecondition(f"cannot remove the cgroup {directory}: {exc.strerror}") from exc
    return True


def _children(directory):
    try:
        return [entry.name for entry in os.scandir(directory) if entry.is_dir()]
    except FileNotFoundError:
        return []


# -- figures and files ------------------------------------------------------------------------------

def _v1_figures(directory):
    return {"memory_bytes": _number(directory, "memory.usage_in_bytes"),
            "memory_peak_bytes": _number(directory, "memory.max_usage_in_bytes"),
            "cpu_ns": _number(directory, "cpuacct.usage"),
            "tasks": _number(directory, "pids.current")}


def _v2_figures(directory):
    found = {"memory_bytes": _number(directory, "memory.current"),
             "memory_peak_bytes": _number(directory, "memory.peak"),
             "tasks": _number(directory, "pids.current")}
    # Every v2 cgroup has a cpu.stat, with or without the cpu controller.
    for line in (_read_if_there(f"{directory}/cpu.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == "usage_usec":
            found["cpu_ns"] = int(value) * 1000
    return found


def _number(directory, name):
    text = _read_if_there(f"{directory}/{name}")
    return int(text) if text else None


def _read_if_there(path):
    try:
        return _read(path)
    except FileNotFoundError:
        return None


def _v2_controllers(root):
    return frozenset((_read_if_there(f"{root}/cgroup.controllers") or "").split())


def _read(path):
    with open(path) as file:
        return file.read().strip()


def _write(path, value):
    """One write(2): the kernel takes a control file's value whole."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)
