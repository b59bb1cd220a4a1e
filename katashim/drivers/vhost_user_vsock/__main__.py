"""Run the device: ``python3 -IS __main__.py --guest-cid N --socket PATH --uds-path PATH [...]``.

The first three options are those of vhost-device-vsock. More:

``--socket-fd N``, ``--uds-fd N``  sockets that listen already, for the two paths
``--until-eof FD``                 end when this fd, such as a pipe from the parent, reaches its end
``--linger SECONDS``               how long to wait for QEMU when its connection ended (2)

It ends with status 0 on SIGTERM, at the end of the fd, or when QEMU is gone for good, and removes
both sockets.
"""

import os
import sys

if not __package__:         # run by its path, isolated: find the rest from there
    sys.path.insert(0, __file__.rsplit("/", 4)[0] or "/")

import resource
import signal
import socket

from katashim.drivers.vhost_user_vsock.device import Device
from katashim.drivers.vhost_user_vsock.frontend import Frontend
from katashim.drivers.vhost_user_vsock.loop import EPOLLIN, Log, Loop

_NAMES = ("guest-cid", "socket", "uds-path", "socket-fd", "uds-fd", "until-eof", "linger")
_FDS = 1024


def _options(arguments):
    """``--name value`` and ``--name=value``, as a dict; exits on anything else."""
    found = {}
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for name, value in zip(words[::2], words[1::2], strict=False):
        if not name.startswith("--") or name[2:] not in _NAMES:
            sys.exit(f"unknown option {name}")
        found[name[2:]] = value
    missing = [name for name in _NAMES[:3] if name not in found]
    if missing or len(words) % 2:
        sys.exit(__doc__ if missing else f"{words[-1]} lacks its value")
    return found


def _listener(path, fd):
    if fd is not None:
        sock = socket.socket(fileno=int(fd))
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        sock.listen(128)
    sock.setblocking(False)
    return sock


def _unlink(path):
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def main(arguments):
    """Serve one VM until it is over."""
    if sys.byteorder != "little" or os.uname().machine != "x86_64":
        sys.exit("this device relies on the memory order of x86-64; use vhost-device-vsock here")
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(_FDS, hard)), hard))

    loop = Loop()
    log = Log(f"vhost-user-vsock[{os.getpid()}]")
    vhost = _listener(options["socket"], options.get("socket-fd"))
    try:
        hybrid = _listener(options["uds-path"], options.get("uds-fd"))
        device = Device(loop, int(options["guest-cid"]), hybrid, options["uds-path"], log)
        # Kept in a name: the loop knows only its handlers.
        frontend = Frontend(loop, device, vhost, float(options.get("linger", 2)), loop.stop, log)
        if "until-eof" in options:
            loop.watch(int(options["until-eof"]), EPOLLIN, lambda events: loop.stop())
        loop.run()
        del frontend
    finally:
        _unlink(options["socket"])
        _unlink(options["uds-path"])


if __name__ == "__main__":
    main(sys.argv[1:])
