"""Listening sockets of the agent, from the C module `_socket` (the Python one takes 70 ms to load).

Called by main.py, console.py, crun.py, server.py.
"""

import os
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket

AF_VSOCK = 40
SCM_RIGHTS = 1
_ANY_CID = 0xFFFFFFFF


def listen_vsock(port, backlog=64):
    """A socket that listens on a vsock port, for any CID."""
    listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC)
    listener.bind((_ANY_CID, port))
    listener.listen(backlog)
    return listener


def listen_unix(path, backlog=64):
    """A socket that listens at `path`, which is replaced."""
    if os.path.lexists(path):
        os.unlink(path)
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    listener.bind(path)
    listener.listen(backlog)
    return listener


def listen(address):
    """A socket that listens at ``vsock://CID:PORT`` (the CID does not matter) or ``unix://PATH``.

    :raises ValueError: another kind of address.
    """
    scheme, _, rest = address.partition("://")
    if scheme == "vsock":
        return listen_vsock(int(rest.rpartition(":")[2]))
    if scheme == "unix":
        return listen_unix(rest)
    raise ValueError(f"cannot listen on {address!r}: only vsock://CID:PORT and unix://PATH")


def accept(listener):
    """The next connection, as a socket."""
    fd, _ = listener._accept()
    return socket(fileno=fd)


def receive_fd(connection):
    """One file descriptor that the other side sends. :raises EOFError: it sent none."""
    _, ancillary, _, _ = connection.recvmsg(1, 64)
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            fd = int.from_bytes(data[:4], "little")
            os.set_inheritable(fd, False)
            return fd
    raise EOFError("no file descriptor came")
