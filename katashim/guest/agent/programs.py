"""Programs of the guest that the agent runs to their end: crun, modprobe, mkfs, iptables.

They are started by vfork and waited for by the reaper; their output is read from a file in memory,
so a child of theirs that keeps it open holds up nobody. Called by crun.py, modules.py, and others.
"""

import os
from _signal import SIGPIPE, SIGXFSZ

from katashim.guest.agent import log, reaper

_OUTPUT_LIMIT = 1 << 20


class Done:
    """A program that ended. :ivar status: exit status or 128 + signal. :ivar output: bytes of its stdout
    and stderr."""

    def __init__(self, status, output):
        self.status, self.output = status, output

    def text(self):
        """The output as one stripped string."""
        return self.output.decode(errors="replace").strip()


def start(argv, stdin, stdout, stderr, environment=None):
    """Start `argv` with these file descriptors as 0 to 2 and default signals; returns its pid.

    :raises OSError: it cannot be executed.
    """
    # posix_spawn: a vfork that is safe beside threads. The fds may be 0..2 themselves or above.
    actions = [(os.POSIX_SPAWN_DUP2, old, new) for new, old in enumerate((stdin, stdout, stderr))]
    return os.posix_spawn(argv[0], argv, os.environ if environment is None else environment,
                          file_actions=actions, setsigdef=(SIGPIPE, SIGXFSZ), setsigmask=())


def run(argv, *, timeout_s, stdin=b"", environment=None):
    """Run `argv` (argv[0] is a path) to its end; returns :class:`Done`.

    :param stdin: bytes that it can read. :raises TimeoutError: it has been killed.
    """
    output = os.memfd_create("output", os.MFD_CLOEXEC)
    source = os.memfd_create("input", os.MFD_CLOEXEC)
    try:
        if stdin:
            os.write(source, stdin)
            os.lseek(source, 0, os.SEEK_SET)
        status = reaper.run(lambda: start(argv, source, output, output, environment), timeout_s, argv[0])
        done = Done(status, os.pread(output, _OUTPUT_LIMIT, 0))
    finally:
        os.close(output)
        os.close(source)
    log.debug("programs", " ".join(argv), status=status)
    return done
