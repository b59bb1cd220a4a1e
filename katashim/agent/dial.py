"""Connections to a port of the guest, by URL.

``vsock://CID:PORT``      the kernel's vsock
``hvsock:///path:PORT``   the hybrid vsock of Firecracker, Cloud Hypervisor and vhost-user backends: a unix
                          socket where ``CONNECT PORT`` is answered by ``OK <host port>``
``unix:///path``          a plain unix socket; ``remote:///path`` is Kata's word for the same

A guest that boots refuses for a while, so :func:`connect` tries again until its deadline. Plain: with
gevent's patching it waits cooperatively. Called by katashim.agent.client and by the console's client.
"""

import errno
import socket
import time
from typing import NamedTuple

from katashim.errors import DeadlineExceeded, InvalidArgument, Unavailable

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.05
# How long one try may take. A guest that resets its vsock device can lose a connection request, which
# then is never answered; a guest under heavy load answers late. So the limit doubles at each expiry.
_FIRST_TRY_S = 2.0
_LONGEST_ANSWER = 64

# Trying again cannot help against these.
_HOPELESS = frozenset((errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EACCES, errno.EPERM,
                       errno.EMFILE, errno.ENFILE))
_LONGEST_PATH = 107                 # bytes in sockaddr_un, without the closing NUL


class Address(NamedTuple):
    """A URL, parsed. `port` is None for plain unix sockets."""

    scheme: str                     # "vsock", "hvsock", "unix"
    place: object                   # the CID (int) or the socket's path (str)
    port: int


def parse(url):
    """Take a URL apart.

    :raises InvalidArgument: it is none of the module's forms, or its path cannot be a socket's.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "remote":
        scheme = "unix"
    if not separator or scheme not in ("vsock", "hvsock", "unix"):
        raise InvalidArgument(f"{url!r} is no address of an agent: it begins with none of vsock://, "
                              "hvsock://, unix:// and remote://")
    if scheme == "unix":
        return Address(scheme, _checked_path(url, rest), None)
    place, _, port = rest.rpartition(":")
    if scheme == "vsock":
        return Address(scheme, _number(url, "CID", place), _number(url, "port", port))
    return Address(scheme, _checked_path(url, place), _number(url, "port", port))


def connect(url, timeout_s, alive=None):
    """Connect, trying again until it succeeds.

    :param url: see the module's text. :param timeout_s: seconds for all tries together.
    :param alive: called between tries; when it returns False (the VM is gone) waiting is pointless.
    :returns: a connected blocking socket; nothing of what the peer sends has been read from it.
    :raises DeadlineExceeded: names the URL and how the last try failed.
    :raises Unavailable: this host can never connect so, or `alive` said no.
    :raises InvalidArgument: see :func:`parse`.
    """
    address = parse(url)
    end = time.monotonic() + timeout_s
    pause_s, try_s = _FIRST_PAUSE_S, _FIRST_TRY_S
    cause = None
    while True:
        if alive is not None and not alive():
            raise Unavailable(f"nobody can answer at {url}: the virtual machine is gone") from cause
        left = end - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(
                f"nothing after {timeout_s:g} s while waiting for an answer at {url}; "
                f"the last try: {_words(cause)}") from cause
        try:
            return _try(address, min(left, try_s))
        except TimeoutError as exc:
            try_s *= 2
            cause = exc
        except OSError as exc:
            if exc.errno in _HOPELESS:
                raise Unavailable(f"cannot connect to {url}: {exc.strerror}") from exc
            cause = exc
        time.sleep(max(0.0, min(pause_s, end - time.monotonic())))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _try(address, timeout_s):
    """One try. :raises OSError: the connection was refused or closed before the guest accepted it."""
    family = socket.AF_VSOCK if address.scheme == "vsock" else socket.AF_UNIX
    sock = socket.socket(family, socket.SOCK_STREAM)
    connected = False
    try:
        sock.settimeout(timeout_s)
        sock.connect((address.place, address.port) if family == socket.AF_VSOCK else address.place)
        if address.scheme == "hvsock":
            _shake_hands(sock, address.port)
        sock.settimeout(None)
        connected = True
        return sock
    finally:
        if not connected:
            sock.close()


def _shake_hands(sock, port):
    sock.sendall(b"CONNECT %d\n" % port)
    answer = b""
    while not answer.endswith(b"\n"):
        byte = sock.recv(1)         # one at a time: what follows the line belongs to the stream
        if not byte:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "the guest does not listen there yet")
        answer += byte
        if len(answer) > _LONGEST_ANSWER:
            break
    if not answer.startswith(b"OK"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"it answered {answer!r} instead of OK")


def _checked_path(url, path):
    if not path.startswith("/"):
        raise InvalidArgument(f"{url!r} names no absolute path")
    if len(path.encode()) > _LONGEST_PATH:
        raise InvalidArgument(f"{url!r} names a path of more than {_LONGEST_PATH} bytes, "
                              "the longest that a unix socket can have")
    return path


def _number(url, what, text):
    # isdecimal() is also true of other scripts' digits.
    if not (text.isascii() and text.isdecimal() and int(text) < 1 << 32):
        raise InvalidArgument(f"{url!r}: {text!r} is no {what}")
    return int(text)


def _words(cause):
    if isinstance(cause, TimeoutError):
        return "no answer"
    return getattr(cause, "strerror", None) or str(cause)
