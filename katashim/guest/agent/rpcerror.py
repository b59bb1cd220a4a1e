"""What a caller of the agent is told when something does not work: a gRPC code and upstream's words.

Upstream's agent answers 13 for nearly all failures, and its hosts look into texts here and there, so
both the codes and the words below are part of the protocol. Called by the whole agent.
"""

import os

INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 3, 4, 5, 12, 13, 14


class RpcError(Exception):
    """An answer with an error status. :ivar code: the gRPC code. :ivar text: the message."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code, self.text = code, text


def invalid_container_id():
    """For calls that look a container up in the sandbox (create, start, exec, remove)."""
    return RpcError(INTERNAL, "Invalid container id")


def describe(error):
    """``(code, text)`` for any exception of a handler.

    Foreseen ones say what failed. A programming error of ours carries its traceback the way upstream's
    agent does, after an empty line, so that a host can show only what stands before it.
    """
    if isinstance(error, RpcError):
        return error.code, error.text
    if isinstance(error, OSError):
        words = f"{os.strerror(error.errno)} (os error {error.errno})" if error.errno else str(error)
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return INTERNAL, f"{': '.join(names)}: {words}" if names else words
    import traceback
    trace = "".join(traceback.format_exception(error))
    return INTERNAL, f"{type(error).__name__}: {error}\n\nStack backtrace:\n{trace}"
