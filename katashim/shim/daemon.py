"""The shim's daemon: from a listening socket to a served Task API, and the orderly end.

`start` forks into :func:`run`; without a verb the same runs in the foreground. Order matters and is
told at each step. containerd's first request is waiting in the socket's backlog all the while, so
nothing that can be done later is done before the server runs.
"""

import os
import posix
import sys

from katashim.shim import endpoint

_REPLIES_S = 2          # for answers still being given when the shim is finished, Shutdown's own among them
_EVENTS_S = 10          # for events that containerd has not taken yet
_TASK_SERVICES = ("containerd.task.v2.Task", "containerd.task.v3.Task")


def run(listener_fd, settings):
    """Serve until the shim is finished; returns the exit status.

    :param listener_fd: the listening socket. :param settings: :class:`katashim.shim.start.Settings`.
    """
    try:
        return _run(listener_fd, settings)
    except Exception:       # noqa: BLE001  the outermost frame: after this there is only exit
        _last_words(settings)
        return 1
    finally:
        endpoint.remove(settings.socket_path, settings.socket_identity)


def _run(listener_fd, settings):
    import gc
    gc.disable()                    # imports make no garbage worth looking for
    os.chdir("/")                   # containerd may delete the bundle
    from katashim.shim import process
    process.isolate()               # before there are threads
    from katashim import green
    green.patch()                   # before anybody imports what it patches
    _start_logging(settings)
    return _serve(listener_fd, settings)


def _serve(listener_fd, settings):
    import gc
    import logging
    import signal
    import socket

    from katashim import green
    from katashim.runtime.shim import Shim
    from katashim.services.events import Publisher
    from katashim.services.task import TaskService
    from katashim.shim import forgotten
    from katashim.shim.reaper import Reaper
    from katashim.ttrpc.server import Server

    log = logging.getLogger(__name__)
    publisher = Publisher(settings.ttrpc_address, settings.namespace)
    shim = Shim(namespace=settings.namespace, id=settings.id, bundle=settings.bundle,
                address=settings.address, publisher=publisher)
    task_service = TaskService(shim)
    server = Server(socket.socket(fileno=listener_fd), dict.fromkeys(_TASK_SERVICES, task_service),
                    name="containerd", on_call=_log_call(log))
    server.start()
    Reaper().start()
    if not settings.foreground:     # a person may take a while
        forgotten.start(server, shim)
    signal.signal(signal.SIGINT, lambda number, frame: green.spawn(     # Ctrl-C in the foreground
        "interrupt", shim.shutdown, settings.id, True))
    gc.freeze()                     # what is loaded stays: the collector need not walk it ever again
    gc.enable()
    log.info("serving %s", settings.address, extra={"bundle": settings.bundle})

    shim.finished.wait()
    endpoint.remove(settings.socket_path, settings.socket_identity)     # from now on a dial fails at once
    publisher.flush(_EVENTS_S)
    server.stop(_REPLIES_S)
    log.info("finished")
    return 0


def _log_call(log):
    """One line for each RPC, at debug level: what, how long, and its code unless that is OK."""
    def on_call(service, method, seconds, code):
        log.debug("%s: %.1f ms%s", method, seconds * 1000, f", code {code}" if code else "")
    return on_call


def _start_logging(settings):
    """Log to the bundle's FIFO, which containerd reads, to $KATASHIM_LOG, and in the foreground to stderr."""
    import logging
    import stat

    from katashim import log
    sinks, problem = [], None
    fifo = os.path.join(settings.bundle, "log")
    if os.path.exists(fifo) and stat.S_ISFIFO(os.stat(fifo).st_mode):
        sinks.append(log.open_fifo(fifo))
    try:
        if os.environ.get("KATASHIM_LOG"):
            sinks.append(log.open_named(os.environ["KATASHIM_LOG"]))
    except OSError as exc:              # no reason to run no pods
        problem = exc
    if settings.foreground and not os.environ.get("KATASHIM_LOG"):
        sinks.append(log.open_stderr())
    log.setup(sinks, logging.DEBUG if settings.debug else logging.INFO, sandbox=settings.id)
    logger = logging.getLogger(__name__)
    if problem is not None:
        logger.warning("cannot log to $KATASHIM_LOG: %s", problem)
    if not settings.foreground:
        sys.stderr = log.LineStream(logger)


def _last_words(settings):
    """The trace of an error that ends the daemon, where somebody may find it; logging may not run yet."""
    import traceback
    text = f"the shim of {settings.id} failed:\n{traceback.format_exc()}"
    where = os.path.join(settings.bundle, "log")
    for path in ["/proc/self/fd/2" if settings.foreground else where, os.environ.get("KATASHIM_LOG", "")]:
        try:
            fd = posix.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
            posix.write(fd, text.encode())
            posix.close(fd)
        except OSError:
            continue            # the last resort has no other resort
