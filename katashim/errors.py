"""Every error katashim raises on purpose, and the gRPC code that each one carries.

containerd reads the codes back (its ``errdefs`` package) and acts on them: NOT_FOUND makes its
delete and kill idempotent, UNIMPLEMENTED makes it fall back to an older API. So a condition that
can be foreseen never leaves this shim as UNKNOWN.

An error says what failed, on which object, and, for a wait, what it waited for. Longer evidence
(the tail of the guest's console, the phase timeline) is attached with :meth:`KatashimError.attach`
and printed after the first line.
"""

# google.rpc.Code, as both ttRPC and gRPC number them.
OK = 0
CANCELLED = 1
UNKNOWN = 2
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
ALREADY_EXISTS = 6
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
ABORTED = 10
OUT_OF_RANGE = 11
UNIMPLEMENTED = 12
INTERNAL = 13
UNAVAILABLE = 14
DATA_LOSS = 15
UNAUTHENTICATED = 16


class KatashimError(Exception):
    """The base of them all.

    :param message: one sentence: what failed, on which object, why, and the cure where it is known.
    """

    code = INTERNAL

    def __init__(self, message):
        super().__init__(message)
        self.message = message
        self.attachments = []

    def attach(self, title, text):
        """Add evidence below the message, once for each title; returns self so that it can be raised."""
        if text and title not in (known for known, _ in self.attachments):
            self.attachments.append((title, text))
        return self

    def __str__(self):
        return self.message

    def full_text(self):
        """The message and all that is attached to it, as one string."""
        return self.message + "".join(
            f"\n--- {title}:\n{text.rstrip()}" for title, text in self.attachments)


class NotFound(KatashimError):
    code = NOT_FOUND


class AlreadyExists(KatashimError):
    code = ALREADY_EXISTS


class InvalidArgument(KatashimError):
    code = INVALID_ARGUMENT


class FailedPrecondition(KatashimError):
    code = FAILED_PRECONDITION


class Unsupported(KatashimError):
    """The thing asked for exists, but not here: not with this driver, kernel or configuration."""

    code = UNIMPLEMENTED


class Unavailable(KatashimError):
    code = UNAVAILABLE


class DeadlineExceeded(KatashimError):
    code = DEADLINE_EXCEEDED


class ResourceExhausted(KatashimError):
    code = RESOURCE_EXHAUSTED


class Cancelled(KatashimError):
    code = CANCELLED


class Internal(KatashimError):
    code = INTERNAL


class ConfigError(InvalidArgument):
    """A setting is unknown, impossible or contradicts another; the message names file and line."""


class HypervisorError(Internal):
    """The VMM refused, failed or died."""


class QmpError(HypervisorError):
    """QEMU answered a QMP command with an error.

    :param cls: QMP's error class, ``GenericError`` or ``DeviceNotFound``, ...
    :param desc: QEMU's own words.
    :param sent: the command that was sent, for the reader of the log.
    """

    def __init__(self, cls, desc, sent):
        super().__init__(f"QEMU refused {sent.get('execute', sent)!r}: {desc} ({cls})")
        self.cls, self.desc, self.sent = cls, desc, sent


class RestError(HypervisorError):
    """A VMM's REST API answered with an error status.

    :param status: the HTTP status, an int.
    :param body: the reply's body, text.
    :param resource: what was called, such as ``PUT /api/v1/vm.boot``.
    """

    def __init__(self, status, body, resource):
        super().__init__(f"{resource} answered {status}: {body.strip()[:2000] or 'no text'}")
        self.status, self.body, self.resource = status, body, resource


class AgentError(KatashimError):
    """The agent in the guest answered an RPC with an error status.

    :param code: the gRPC code the agent gave.
    :param method: the RPC, such as ``CreateContainer``.
    :param text: the agent's words. Upstream's agent appends stack traces: only what stands before
        them becomes the message, the rest is attached.
    """

    def __init__(self, code, method, text):
        head, _, trace = text.partition("\n\nStack backtrace:")
        super().__init__(f"the guest's agent refused {method}: {head.strip()}")
        self.code, self.method, self.text = code, method, text
        self.attach("stack trace of the agent", trace)


class ConnectionClosed(Unavailable):
    """The other end of a connection went away.

    :param maybe_executed: True when a request may have been carried out although its reply is lost.
    """

    def __init__(self, message, maybe_executed=False):
        super().__init__(message)
        self.maybe_executed = maybe_executed


def status_of(exc):
    """What a caller is told of an exception: ``(gRPC code, text)``. The only place that decides it."""
    if isinstance(exc, KatashimError):
        return exc.code, exc.full_text()
    if isinstance(exc, FileNotFoundError):
        return NOT_FOUND, str(exc)
    if isinstance(exc, FileExistsError):
        return ALREADY_EXISTS, str(exc)
    if isinstance(exc, PermissionError):
        return PERMISSION_DENIED, str(exc)
    if isinstance(exc, OSError):
        return INTERNAL, str(exc)
    return INTERNAL, f"katashim failed in a way it did not foresee: {type(exc).__name__}: {exc}"
