"""Where log records go, and what they look like: JSON lines with the field names that Kata uses.

Every module logs with the standard library (``log = logging.getLogger(__name__)``); this one sends
the records of the process to the places chosen by whoever started it: the FIFO called ``log`` in
containerd's bundle, a file, or stderr. A line looks like this (one line, keys in this order)::

    {"time": "2026-05-01T12:00:00.123456Z", "level": "info", "msg": "started", "name": "katashim",
     "pid": 4711, "source": "katashim", "subsystem": "drivers.qemu", "sandbox": "s1",
     "container": "c1", "exec": "e1"}

``extra={...}`` of a logging call adds its keys, and an exception its trace as ``exc_info``. The ids
come from :func:`context` (everything logged inside a ``with`` block) or :func:`bind` (everything
logged through one logger).

Writing never waits: descriptors are non-blocking, and a line that finds no room is dropped, counted,
and reported by the next line that does find room. So a containerd that stopped reading cannot stop
a pod, and a log call is no point at which greenlets switch.

Plain: works with and without gevent. The JSON formatter (python-json-logger, 1.5 MiB) is loaded by
the first record, not by the import.
"""

import logging
import os
import time
from contextvars import ContextVar

_VALUE_MAX_CHARS = 32 * 1024        # of one field: a trace with a console's tail attached fits

_ids = ContextVar("katashim_log_ids", default=None)


def setup(sinks, level=logging.INFO, **fields):
    """Send the records of this process to `sinks`, and no longer where they went before.

    :param sinks: list of :class:`Sink`. :param level: of our own loggers; other libraries are heard
        from ``WARNING`` up.
    :param fields: keys added to each record, such as ``sandbox="s1"``.
    :returns: the :class:`Handler`, for :meth:`Handler.close`.
    """
    handler = Handler(sinks, fields)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("katashim").setLevel(level)
    return handler


class context:
    """Add ids to all that this greenlet logs inside the ``with`` block: ``container=``, ``exec=``.

    Greenlets that are spawned inside do not inherit it. Empty ids are left out, as containerd sends
    an empty exec id for a container's own process.
    """

    __slots__ = ("_fields", "_token")

    def __init__(self, **ids):
        self._fields = {key: value for key, value in ids.items() if value}

    def __enter__(self):
        outer = _ids.get()
        self._token = _ids.set({**outer, **self._fields} if outer else self._fields)

    def __exit__(self, *error):
        _ids.reset(self._token)
        return False


def bind(logger, **ids):
    """`logger` with ids added to each of its records: ``log.bind(log, container=cid, exec=eid)``."""
    return _Bound(logger, {key: value for key, value in ids.items() if value})


class _Bound(logging.LoggerAdapter):
    def process(self, msg, kwargs):
        kwargs["extra"] = {**self.extra, **kwargs.get("extra", {})}
        return msg, kwargs


class Sink:
    """A non-blocking descriptor that lines are written to.

    :param fd: is owned by the sink from now on.
    """

    def __init__(self, fd, name):
        self.fd, self.name = fd, name
        self.dropped = 0            # lines lost since the last line that found room
        self._rest = b""            # what is left of a line whose beginning is written

    def write(self, line):
        """Write one line (bytes, with its newline) if there is room; whether there was."""
        if self._rest and not self._push(self._rest):
            self.dropped += 1
            return False
        if self._push(line):
            return True
        if self._rest:              # begun, and continued by a later call
            return True
        self.dropped += 1
        return False

    def close(self):
        """Close the descriptor; later lines are dropped."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def _push(self, data):
        """Write what fits; True when that is all of it. Keeps the rest of what has been begun."""
        if self.fd is None:
            return False
        try:
            written = os.write(self.fd, data)
        except OSError:             # full, or its reader is gone, or the disk is full: counted, not raised,
            return False            # for whoever logs can do nothing about it
        self._rest = data[written:]
        return not self._rest


def open_fifo(path):
    """A sink on the FIFO at `path`, which must exist.

    Opened for reading too, so that the open never waits for a reader, a reader that goes away is no
    broken pipe, and what was written before containerd came back is still there for it.
    :raises OSError: there is none, or it is not a FIFO and refuses it.
    """
    return Sink(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC), path)


def open_file(path):
    """A sink that appends to the file at `path`, made with mode 0640 when it is missing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
    return Sink(os.open(path, flags, 0o640), path)


def open_stderr():
    """A sink on stderr, through an open file description of its own, so that making it non-blocking
    does not reach the other processes that share it. (A socket cannot be opened again: duplicated.)"""
    try:
        fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        fd = os.dup(2)
    return Sink(fd, "stderr")


def open_named(where):
    """The sink that the environment variable KATASHIM_LOG names: ``stderr`` or the path of a file."""
    return open_stderr() if where == "stderr" else open_file(where)


class Handler(logging.Handler):
    """Formats records and hands the lines to sinks. See :func:`setup`."""

    def __init__(self, sinks, fields):
        super().__init__()
        self._sinks = list(sinks)
        self._fields = {"name": "katashim", "pid": os.getpid(), "source": "katashim", **fields}
        self._formatter = None

    def createLock(self):
        """None: a write is one system call, and a lock that gevent patched would switch greenlets."""
        self.lock = None

    def handle(self, record):
        """As logging's, which since Python 3.13 takes the lock without looking whether there is one."""
        wanted = self.filter(record)
        if wanted:
            self.emit(record if wanted is True else wanted)
        return wanted

    def emit(self, record):
        """Write `record` to every sink."""
        line = self._line(record)
        for sink in self._sinks:
            lost = sink.dropped
            if lost and not sink.write(self._line(_gap(lost))):
                continue        # still no room; write() has counted the notice as one more lost line
            if lost:
                sink.dropped -= lost
            sink.write(line)

    def close(self):
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()
        super().close()

    def _line(self, record):
        if self._formatter is None:
            self._formatter = _make_formatter(self._fields)
        return self._formatter.format(record).encode("utf-8", "backslashreplace") + b"\n"


def _gap(lost):
    return logging.makeLogRecord({
        "name": __name__, "levelno": logging.WARNING, "levelname": "WARNING",
        "msg": f"{lost} log records found no room and are lost", "lost": lost})


def _make_formatter(fields):
    from pythonjsonlogger.json import JsonFormatter

    class Formatter(JsonFormatter):
        def add_fields(self, line, record, message):
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            line["time"] = f"{stamp}.{int(record.created % 1 * 1_000_000):06d}Z"
            line["level"] = record.levelname.lower()
            line["msg"] = record.message
            line.update(fields)
            line["subsystem"] = record.name.removeprefix("katashim.")
            line.update(_ids.get() or {})
            super().add_fields(line, record, message)
            for key, value in line.items():
                if isinstance(value, str) and len(value) > _VALUE_MAX_CHARS:
                    line[key] = f"{value[:_VALUE_MAX_CHARS]}... ({len(value)} characters)"

        def formatException(self, exc_info):
            text = super().formatException(exc_info)
            attachments = getattr(exc_info[1], "attachments", ())
            return text + "".join(f"\n--- {title}:\n{evidence}" for title, evidence in attachments)

    # A format that names no field, for add_fields places them all; "" would mean the default one.
    return Formatter(fmt=" ", validate=False, json_ensure_ascii=False)


class LineStream:
    """A text stream whose lines become log records; stands in for sys.stderr in the daemon.

    gevent's hub, unraisable errors and warnings print there, and the daemon's own stderr is /dev/null.
    """

    encoding = "utf-8"

    def __init__(self, logger, level=logging.ERROR):
        self._logger, self._level = logger, level
        self._text = ""

    def write(self, text):
        """Take `text`; each complete line is logged."""
        *lines, self._text = (self._text + text).split("\n")
        for line in lines:
            if line.strip():
                self._logger.log(self._level, "%s", line)
        return len(text)

    def flush(self):
        """Nothing to do: a line is logged when it is complete."""

    def isatty(self):
        """False, as for any stream that is not a terminal."""
        return False
