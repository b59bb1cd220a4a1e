"""What containerd says on stdin of ``start``, and the form in which it wants its answer.

containerd up to 2.2 sends the runtime's options (an ``Any``) or nothing and reads an address; 2.3
sends ``containerd.runtime.bootstrap.v1.BootstrapParams`` and prefers a ``BootstrapResult``. Both
kinds of bytes decode as each other, so parameters count only when they repeat the id and the
namespace of the command line (or stand in for those that are missing there).

Part of the start path: only C builtins are imported.
"""

import posix
from time import monotonic

from katashim.errors import InvalidArgument
from katashim.shim import wire

TASK_API = 3                    # the newest Task service that the daemon serves
_STDIN_MAX_BYTES = 4 << 20
_RESULT_SINCE = (2, 3)          # the containerd that reads a BootstrapResult


# Field numbers of BootstrapParams' texts; 3 is the log level, 8 are extensions for others.
_TEXTS = {1: "instance_id", 2: "namespace", 4: "containerd_version", 5: "ttrpc_address",
          6: "grpc_address", 7: "binary", 9: "socket_dir"}


class Params:
    """A decoded BootstrapParams; texts are "" where they are absent."""

    __slots__ = ("binary", "containerd_version", "debug", "grpc_address", "instance_id", "namespace",
                 "socket_dir", "ttrpc_address")

    def __init__(self):
        for name in _TEXTS.values():
            setattr(self, name, "")
        self.debug = False


def read_stdin(timeout_s, fd=0):
    """All bytes that arrive on `fd` until its end, but no longer than `timeout_s` seconds.

    A terminal is not read: a person has nothing to say here. Never waits for a silent writer beyond
    the bound; what came until then is dropped, for half a message is worse than none.
    """
    try:
        if posix.isatty(fd):
            return b""
        posix.fstat(fd)
    except OSError:                 # closed
        return b""
    import select
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    end, data = monotonic() + timeout_s, b""
    while len(data) < _STDIN_MAX_BYTES:
        if not poller.poll(max(0.0, end - monotonic()) * 1000):
            return b""
        chunk = posix.read(fd, 65536)
        if not chunk:
            return data
        data += chunk
    return b""


def decode(data, flags):
    """The :class:`Params` in `data`, or None when the bytes are something else or nothing.

    :param flags: the command line's; its id and namespace, where given, must be the same.
    """
    params = Params()
    try:
        for number, value in wire.read_fields(data):
            if number in _TEXTS and isinstance(value, bytes):
                setattr(params, _TEXTS[number], value.decode())
            elif number == 3 and isinstance(value, int):
                params.debug = value >> 63 == 1         # levels below 0 are debug and trace
    except (InvalidArgument, UnicodeDecodeError):
        return None
    same = (params.instance_id and params.namespace
            and flags.id in ("", params.instance_id) and flags.namespace in ("", params.namespace))
    return params if same else None


def complete(flags, params):
    """Fill what the command line left out from `params`."""
    flags.id = flags.id or params.instance_id
    flags.namespace = flags.namespace or params.namespace
    flags.address = flags.address or params.grpc_address
    flags.publish_binary = flags.publish_binary or params.binary
    flags.debug = flags.debug or params.debug


def answer(address, params, max_version):
    """The bytes to print on stdout for `address` ("unix:///...").

    The plain address is what every containerd understands, so that is the answer unless the caller
    has said that it knows better.

    :param params: :class:`Params` or None. :param max_version: $MAX_SHIM_VERSION, a str or "".
    """
    if params is not None and _version(params.containerd_version) >= _RESULT_SINCE:
        return wire.integer(1, TASK_API) + wire.text(2, address) + wire.text(3, "ttrpc")
    if max_version.isdigit() and int(max_version) >= TASK_API:
        return f'{{"version":{TASK_API},"address":"{address}","protocol":"ttrpc"}}'.encode()
    return address.encode()


def _version(text):
    """``(major, minor)`` of "v2.3.1-rc.0+unknown"; (0, 0) for what is no version."""
    parts = text.removeprefix("v").split(".")
    if len(parts) < 2 or not parts[0].isdigit():
        return (0, 0)
    minor = parts[1].partition("-")[0].partition("+")[0]
    return (int(parts[0]), int(minor)) if minor.isdigit() else (0, 0)
