"""The program ``containerd-shim-katashim-v2``: what it does for which command line.

bin/containerd-shim-katashim-v2 calls :func:`main`. Every way out is ``_exit``: tearing down an
interpreter costs more than ``start`` and ``delete`` together. Part of the start path: only C builtins
are imported until the verb is known.
"""

import posix
import sys

from katashim import VERSION
from katashim.errors import KatashimError
from katashim.shim import flags as flags_module

NAME = "containerd-shim-katashim-v2"
RUNTIME = "io.containerd.katashim.v2"


def main(arguments):
    """Run the shim with `arguments` (a list of str without the program's name); never returns.

    Exit status: 0 when done; 1 when not, with the reason on stderr and nothing on stdout.
    """
    try:
        out = _run(flags_module.parse(arguments))
    except KatashimError as exc:
        _write(2, f"{NAME}: {exc.full_text()}\n".encode())
        posix._exit(1)
    _write(1, out)
    posix._exit(0)


def _run(flags):
    if flags.help:
        return flags_module.USAGE.encode()
    if flags.version:
        return f"{NAME} {VERSION} (Python {sys.version.split()[0]}, {sys.executable})\n".encode()
    if flags.info:
        from katashim.shim import info
        return info.runtime_info(RUNTIME)
    if flags.action == "start":
        from katashim.shim import start
        return start.start(flags)
    if flags.action == "delete":
        from katashim.shim import delete
        return delete.delete(flags)
    from katashim.shim import start
    listener, settings = start.listen_for(flags)
    from katashim.shim import daemon
    posix._exit(daemon.run(listener.detach(), settings))


def _write(fd, data):
    """Write all of `data`; a reader that went away ends the program without a word, as it must."""
    while data:
        try:
            data = data[posix.write(fd, data):]
        except OSError:
            posix._exit(1)
