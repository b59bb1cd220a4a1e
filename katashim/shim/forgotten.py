"""The end of a shim that nobody will ever end.

containerd can be killed between starting a shim and its first Create, in the middle of that Create, or
between Delete and Shutdown. When it is back it asks the shim for the container, hears that there is none,
and executes `delete`, which leaves a living shim alone. So a shim that has no container, and no client
that could give it one, goes by itself, and takes its VM with it. Started by katashim.shim.daemon.
"""

import logging
import time

from katashim import green

log = logging.getLogger(__name__)

_FORGOTTEN_S = 10       # containerd connects as soon as `start` has printed the address


def start(server, shim):
    """Watch from now on.

    :param server: katashim.ttrpc.server.Server. :param shim: katashim.runtime.shim.Shim.
    """
    green.spawn("watch for a forgotten shim", _watch, server, shim)


def _watch(server, shim):
    while not shim.finished.is_set():
        server.idle.wait()
        left = _FORGOTTEN_S - (time.monotonic() - server.idle_since)
        if left <= 0 and shim.is_empty():
            log.warning("nobody has been connected for %g s, and there is no container: the end", _FORGOTTEN_S)
            shim.shutdown(shim.id, now=True)
            return
        shim.finished.wait(left if left > 0 else _FORGOTTEN_S)
