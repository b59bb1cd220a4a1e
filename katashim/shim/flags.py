"""The command line of the shim, in the syntax of Go's ``flag`` package, which containerd writes.

    containerd-shim-katashim-v2 -namespace NS -address SOCK -publish-binary BIN -id ID [-debug] start
    containerd-shim-katashim-v2 -namespace NS ... -id ID -bundle DIR delete

``-x v``, ``-x=v`` and ``--x`` are the same; a boolean flag takes its value only after ``=``; the
first word that is no flag is the action, and what follows it is not looked at. Part of the start
path: only C builtins are imported below here.
"""

from katashim.errors import InvalidArgument

USAGE = """\
usage: containerd-shim-katashim-v2 -namespace NS -id ID [-address SOCK] [flags] [action]

A containerd shim (v2) that runs each pod in a virtual machine. containerd executes it.

actions:
  start     listen on the sandbox's socket, leave a daemon behind, print the address
  delete    clean up after a shim that died; prints a DeleteResponse (protobuf)
  (none)    run the daemon in the foreground

flags:
  -namespace NS        containerd's namespace
  -id ID               of the container; for a pod's first one it is the sandbox's id
  -address SOCK        containerd's own socket (may be empty)
  -publish-binary BIN  accepted for containerd's sake; events go over ttRPC instead
  -bundle DIR          the container's bundle; the working directory by default
  -debug               log more
  -info                print what this runtime is (protobuf RuntimeInfo)
  -v, -version         print the version
  -h, -help            print this

environment:
  TTRPC_ADDRESS        where events are sent
  KATASHIM_LOG         also log to this file, or to "stderr"
  KATASHIM_SOCKET_DIR  directory of the shims' sockets (default /run/containerd/s)
  KATASHIM_PYTHON      the interpreter to run with
"""

_TEXT = {"namespace": "namespace", "id": "id", "address": "address", "bundle": "bundle",
         "publish-binary": "publish_binary"}
_SWITCHES = {"debug": "debug", "info": "info", "v": "version", "version": "version",
             "h": "help", "help": "help"}
_TRUE = frozenset(("1", "t", "T", "true", "TRUE", "True"))
_FALSE = frozenset(("0", "f", "F", "false", "FALSE", "False"))

_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_MARKS = frozenset("_.-")
ID_MAX_CHARS = 76           # containerd's own limit for identifiers


class Flags:
    """What the command line said; absent texts are "", absent switches False."""

    __slots__ = ("action", "address", "bundle", "debug", "help", "id", "info", "namespace",
                 "publish_binary", "version")

    def __init__(self):
        self.namespace = self.id = self.address = self.bundle = self.publish_binary = ""
        self.debug = self.info = self.version = self.help = False
        self.action = ""        # "start", "delete", or "" for the daemon in the foreground


def parse(arguments):
    """:class:`Flags` from `arguments`, a list of str without the program's name.

    :raises InvalidArgument: an unknown flag, a flag without its value, an unknown action.
    """
    flags = Flags()
    words = list(arguments)
    while words and len(words[0]) > 1 and words[0][0] == "-":
        word = words.pop(0)
        if word == "--":
            break
        name, has_value, value = word[2 if word[:2] == "--" else 1:].partition("=")
        if name in _SWITCHES:
            setattr(flags, _SWITCHES[name], _boolean(name, value) if has_value else True)
        elif name in _TEXT:
            if not has_value:
                if not words:
                    raise InvalidArgument(f"flag -{name} needs a value")
                value = words.pop(0)
            setattr(flags, _TEXT[name], value)
        else:
            raise InvalidArgument(f"unknown flag {word!r}; -help lists those there are")
    if words:
        flags.action = words[0]
    if flags.action not in ("", "start", "delete"):
        raise InvalidArgument(f"unknown action {flags.action!r}: start, delete, or none")
    return flags


def _boolean(name, value):
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise InvalidArgument(f"flag -{name} is a switch and cannot be {value!r}")


def check_id(value, what):
    """Return `value` when it is safe as a part of a path and of a socket's name.

    :param what: "id" or "namespace", for the message.
    :raises InvalidArgument: it does not match ``[alnum][alnum_.-]+``, or is longer than containerd allows.
    """
    if not value:
        raise InvalidArgument(f"-{what} is missing")
    if len(value) > ID_MAX_CHARS:
        raise InvalidArgument(f"{what} {value[:ID_MAX_CHARS]!r}... has {len(value)} characters, "
                              f"at most {ID_MAX_CHARS} are allowed")
    rest = frozenset(value[1:])
    if value[0] not in _LETTERS or not rest or not rest <= _LETTERS | _MARKS:
        raise InvalidArgument(f"{what} {value!r} is not valid: a letter or digit, then at least one "
                              "more letter, digit, '_', '.' or '-'")
    return value
