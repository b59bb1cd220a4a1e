"""The agent's log: short lines on the console, JSON records for the host's log port.

Upstream's agent streams newline-delimited JSON to the first connection on ``agent.log_vport``; the
host forwards it into its own log. Records from before the connection are kept, up to a limit.
Called by the whole agent.
"""

import os
import sys
import threading
import time

from katashim.guest.agent import jsontext

ERROR, WARNING, INFO, DEBUG = 1, 2, 3, 4
_NAMES = {ERROR: "ERRO", WARNING: "WARN", INFO: "INFO", DEBUG: "DEBG"}
_KEEP = 500             # records kept for a host that has not connected yet

level = INFO            # of records
console_level = WARNING  # of lines on the console: the emulated serial port is slow
_lock = threading.Lock()    # guards _kept and _sink
_kept = []
_sink = None


def error(subsystem, text, /, **facts):
    """Something failed for good."""
    _record(ERROR, subsystem, text, facts)


def warning(subsystem, text, /, **facts):
    """Something is not as it should be, but nothing failed yet."""
    _record(WARNING, subsystem, text, facts)


def info(subsystem, text, /, **facts):
    """A rare change of state."""
    _record(INFO, subsystem, text, facts)


def debug(subsystem, text, /, **facts):
    """One per RPC or program that was run."""
    _record(DEBUG, subsystem, text, facts)


def console(text):
    """A line on the guest's console, whatever the level."""
    try:
        os.write(2, f"{text}\n".encode(errors="replace"))
    except OSError:
        pass        # no console: there is nobody to tell


def stream_to(connection):
    """Send all kept and all future records to `connection` (a socket), until it breaks."""
    global _sink
    with _lock:
        _sink = connection
        waiting, _kept[:] = list(_kept), []
        for line in waiting:
            _send(line)


def unforeseen(subsystem, what):
    """Report the exception being handled, one that no code expected, with its traceback."""
    import traceback
    error(subsystem, f"{what}: {traceback.format_exc()}", error=str(sys.exc_info()[1]))


def _record(severity, subsystem, text, facts):
    if severity <= console_level:
        told = "".join(f" {key}={value}" for key, value in facts.items())
        console(f"agent: {_NAMES[severity]} {subsystem}: {text}{told}")
    if severity > level:
        return
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1e9) % 10**9:09d}Z"
    line = jsontext.dumps({
        "msg": text, "level": _NAMES[severity], "ts": stamp, "pid": str(os.getpid()), "version": "1",
        "name": "kata-agent", "source": "agent", "subsystem": subsystem,
        **{key: str(value) for key, value in facts.items()}}).encode() + b"\n"
    with _lock:
        _send(line)


def _send(line):
    """Hand one record over; the caller holds the lock."""
    global _sink
    if _sink is not None:
        try:
            _sink.sendall(line)
            return
        except OSError:
            _sink.close()
            _sink = None
    if len(_kept) < _KEEP:
        _kept.append(line)
