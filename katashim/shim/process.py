"""The shim's process as the kernel sees it: mount namespace, subreaper, core scheduling, OOM score, signals.

Called once by the daemon, before it has threads (unshare(2) of a mount namespace is per thread).
"""

import ctypes
import logging
import os
import signal

from katashim.errors import KatashimError
from katashim.resources import mounts

log = logging.getLogger(__name__)

_CLONE_NEWNS = 0x00020000
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SCHED_CORE = 62
_PR_SCHED_CORE_CREATE = 1
_PR_SCHED_CORE_PROCESS_GROUP = 2
_OOM_SCORE_MAX = 1000
_COMM = b"containerd-shim"      # at most 15 bytes

_libc = ctypes.CDLL(None, use_errno=True)


def isolate():
    """Make this process a shim. What only helps is logged when it fails; what isolates must succeed.

    :raises KatashimError: no mount namespace of its own, or no subreaper (it runs without root).
    """
    _own_mounts()
    _prctl("becoming the reaper of orphans", _PR_SET_CHILD_SUBREAPER, 1)
    _prctl("naming the process", _PR_SET_NAME, _COMM)
    signal.signal(signal.SIGTERM, _ignore)
    _adjust_oom_score()
    if os.environ.get("SCHED_CORE"):
        _schedule_by_core()


def _own_mounts():
    """A mount namespace of its own: what the shim mounts goes with it, and the host does not see it.

    First a slave, so that nothing spreads to the host while what the host mounts still arrives
    (a volume mounted later); then shared again, so that virtiofsd's namespace, made from this one,
    sees what is mounted afterwards.
    """
    if _libc.unshare(_CLONE_NEWNS) != 0:
        raise KatashimError("cannot have a mount namespace of its own: " + os.strerror(ctypes.get_errno()))
    try:
        mounts.set_propagation("/", mounts.MS_REC | mounts.MS_SLAVE)
        mounts.set_propagation("/", mounts.MS_REC | mounts.MS_SHARED)
    except OSError as exc:
        raise KatashimError(f"cannot detach from the host's mounts: {exc.strerror}") from exc


def _ignore(number, frame):
    """SIGTERM does nothing: systemd sends it to all processes of a stopping scope, and the shim must
    stay to clean up. A handler, unlike SIG_IGN, is not inherited by the VMM and the other children."""


def _adjust_oom_score():
    """One more than containerd's score, as containerd's own shims have it: containerd is killed last,
    a shim last but one. Children inherit it; whoever starts a VMM gives it the pod's."""
    path = "/proc/self/oom_score_adj"
    try:
        with open(path) as file:
            score = int(file.read())
        with open(path, "w") as file:
            file.write(str(min(score + 1, _OOM_SCORE_MAX)))
    except OSError as exc:
        log.warning("cannot set the OOM score: %s", exc)


def _schedule_by_core():
    """Share no core with a stranger's hyperthread (containerd sets SCHED_CORE in the environment)."""
    try:
        _prctl("core scheduling", _PR_SCHED_CORE, _PR_SCHED_CORE_CREATE, 0, _PR_SCHED_CORE_PROCESS_GROUP, 0)
    except KatashimError as exc:
        log.warning("%s", exc)


def _prctl(what, option, *arguments):
    words = [argument if isinstance(argument, bytes) else ctypes.c_ulong(argument) for argument in arguments]
    words += [ctypes.c_ulong(0)] * (4 - len(words))
    if _libc.prctl(option, *words) != 0:
        raise KatashimError(f"{what} failed: {os.strerror(ctypes.get_errno())}")
