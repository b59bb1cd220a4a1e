"""Hooks of the guest's image (``guest_hook_path``): programs that are told of each container's life.

They get the container's state as JSON on stdin, as the runtime spec's hooks do, and the guest's namespaces.
Not run by crun: its 1.8 dies of SIGPIPE when a hook does not read. Called by sandbox.py, container.py.
"""

import os

from katashim.guest.agent import jsontext, log, programs
from katashim.guest.agent.rpcerror import INTERNAL, RpcError

PRESTART, POSTSTART, POSTSTOP = "prestart", "poststart", "poststop"
_TIMEOUT_S = 30


class Hooks:
    """The executable files below a directory's ``prestart``, ``poststart`` and ``poststop``.

    :param directory: path in the guest, "" for none.
    """

    def __init__(self, directory=""):
        self._programs = {kind: _executables(f"{directory}/{kind}") if directory else ()
                          for kind in (PRESTART, POSTSTART, POSTSTOP)}

    def run(self, kind, cid, status, pid, bundle):
        """Run all of a kind, in the order of their names.

        :param status: of the container, in the runtime spec's words. :param pid: of its init, 0 for none.
        :raises RpcError: a prestart hook failed. Others that fail are logged, as the runtime spec has it.
        """
        state = jsontext.dumps({"ociVersion": "1.0.2", "id": cid, "status": status, "pid": pid,
                                "bundle": bundle})
        for path in self._programs[kind]:
            done = programs.run([path], timeout_s=_TIMEOUT_S, stdin=state.encode())
            if done.status != 0:
                text = f"{kind} hook {path} ended with {done.status}: {done.text()}"
                if kind == PRESTART:
                    raise RpcError(INTERNAL, text)
                log.warning("hooks", text)


def _executables(directory):
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else ()
    paths = [f"{directory}/{name}" for name in names]
    return [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]
