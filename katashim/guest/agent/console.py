"""Two doors for people: the debug console (a shell for each connection) and the log port.

Ports and behaviour are upstream's: ``agent.debug_console`` with ``agent.debug_console_vport=1026``, and
``agent.log_vport=1025``, where the agent listens and streams to one connection. Called by main.py.
"""

import fcntl
import os
import select
import struct
import threading
from _signal import SIGHUP

from katashim.guest.agent import log, reaper, sockets

_SHELLS = ("/run/kata-extensions/devkit/bin/devkit-sh", "/bin/bash", "/bin/sh")
_TIOCSCTTY, _TIOCSWINSZ = 0x540E, 0x5414


def start(settings):
    """Open the doors that `settings` ask for, each with its own thread."""
    if settings.log_vport:
        _thread("log", _serve_log, sockets.listen_vsock(settings.log_vport, 1))
    if settings.debug_console and settings.debug_console_vport:
        _thread("debug console", _serve_shells, sockets.listen_vsock(settings.debug_console_vport))
    elif settings.debug_console:
        _thread("debug console", _shells_on_console)


def _thread(name, function, *arguments):
    threading.Thread(target=function, args=arguments, name=name, daemon=True).start()


def _serve_log(listener):
    connection = sockets.accept(listener)
    connection.settimeout(2)        # a host that does not read loses the stream, the agent goes on
    log.stream_to(connection)


def _serve_shells(listener):
    while True:
        _thread("debug shell", _serve_shell, sockets.accept(listener))


def _serve_shell(connection):
    master, slave = os.openpty()
    fcntl.ioctl(master, _TIOCSWINSZ, struct.pack("<HHHH", 24, 80, 0, 0))
    try:
        with reaper.starting() as children:
            end = children.adopt(_start_shell(slave))
        os.close(slave)
        _relay(connection, master, end)
    finally:
        os.close(master)
        connection.close()


def _shells_on_console():
    while True:
        terminal = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
        try:
            with reaper.starting() as children:
                end = children.adopt(_start_shell(terminal))
        finally:
            os.close(terminal)
        end.wait()


def _start_shell(terminal):
    """Fork a login shell with `terminal` as its controlling terminal; returns its pid."""
    shell = next(path for path in _SHELLS if os.path.exists(path))
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        fcntl.ioctl(terminal, _TIOCSCTTY, 1)
        for fd in (0, 1, 2):
            os.dup2(terminal, fd)
        os.chdir("/")
        os.execve(shell, [shell, "-i"], {**os.environ, "TERM": "linux", "HOME": "/root", "PS1": "guest# "})
    finally:
        os._exit(127)


def _relay(connection, master, end):
    """Copy between a connection and a pty until either ends; hangs the shell up."""
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    poller.register(master, select.POLLIN)
    try:
        while True:
            for fd, _ in poller.poll():
                data = os.read(fd, 4096)
                if not data:
                    return
                if fd == master:
                    connection.sendall(data)
                else:
                    os.write(master, data)
    except OSError as exc:      # EIO: the shell is gone; others: the connection is
        log.debug("console", f"a debug console ended: {exc}")
    finally:
        if end.status is None:
            os.kill(end.pid, SIGHUP)
