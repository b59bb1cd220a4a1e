"""A socket to the kernel's rtnetlink: requests with acknowledgement, dumps, errors that say what failed.

The kernel handles a request while the sender is inside send(2), so the reply lies ready when that
returns, and the deadline on receiving is a safety net. What can take time is the sending (the kernel's
RTNL lock is shared by the whole machine): the daemon calls whoever uses this through
``green.in_thread``.

Plain. The socket is the interpreter's own (``_socket``), not the one of the `socket` module, which in
the daemon is gevent's: that would build an event hub in every native thread that uses it.
"""

import _socket
import errno
import logging
import os
import socket

from katashim import errors
from katashim.resources import netns as namespaces
from katashim.resources.netlink import codec

log = logging.getLogger(__name__)

_SOL_NETLINK = 270
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 10, 11
_NETLINK_ROUTE = 0
_RECEIVE_BYTES = 64 * 1024          # the kernel packs dumps into at most 32 KiB
_DUMP_TRIES = 20

_CODES = {
    errno.EEXIST: errors.ALREADY_EXISTS, errno.ENODEV: errors.NOT_FOUND, errno.ENOENT: errors.NOT_FOUND,
    errno.EPERM: errors.PERMISSION_DENIED, errno.EACCES: errors.PERMISSION_DENIED,
    errno.EOPNOTSUPP: errors.UNIMPLEMENTED, errno.EBUSY: errors.UNAVAILABLE,
    errno.ENOMEM: errors.RESOURCE_EXHAUSTED, errno.ENOBUFS: errors.RESOURCE_EXHAUSTED,
}


class NetlinkError(errors.KatashimError):
    """The kernel refused a request.

    :ivar errno: the error number, such as ``errno.EEXIST``.
    :ivar words: the kernel's explanation, often "".
    """

    def __init__(self, what, where, number, words):
        super().__init__(f"{what} in {where}: {os.strerror(number)}{': ' + words if words else ''}")
        self.errno, self.words = number, words
        self.code = _CODES.get(number, errors.INTERNAL)


class Connection:
    """An rtnetlink socket in one network namespace. Not to be shared by threads.

    :param netns: path of the namespace, or None for the present one. It stays reachable through this
        object even when the path goes away.
    :param inode: the inode number the namespace must have, or None.
    :param timeout_s: how long to wait for a reply.
    :param sock: a socket instead of one to the kernel, for tests that play the kernel.
    :raises NotFound: there is no such namespace.
    """

    def __init__(self, netns=None, inode=None, timeout_s=5, sock=None):
        self.where = f"the network namespace {netns}" if netns else "the present network namespace"
        self._timeout_s = timeout_s
        self._sequence = 0
        self._socket = sock or _open_socket(netns, inode)
        self._socket.settimeout(timeout_s)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()
        return False

    def close(self):
        """Close the socket; again is no error."""
        self._socket.close()

    def fileno(self):
        """The socket's descriptor: ioctls on it reach the links of its namespace (netdevice(7))."""
        return self._socket.fileno()

    def request(self, what, kind, payload, flags=0):
        """Send one request and wait for its acknowledgement.

        :param what: what it does to which object, for the error: "adding the link veth0".
        :param kind: message type, RTM_*. :param payload: fixed part and attributes, bytes.
        :returns: payloads of the messages that came before the acknowledgement.
        :raises NetlinkError: the kernel refused. :raises DeadlineExceeded: it did not answer.
        """
        sequence = self._send(what, kind, payload, flags | codec.NLM_F_REQUEST | codec.NLM_F_ACK)
        replies = []
        while True:
            for reply in self._receive(what, sequence):
                if reply.type != codec.NLMSG_ERROR:
                    replies.append(reply.payload)
                    continue
                self._check(what, reply)
                return replies

    def dump(self, what, kind, payload):
        """Ask for a table. One that changed while it was read is read again.

        :returns: payloads of its entries.
        :raises NetlinkError: the kernel refused. :raises Unavailable: it changes all the time.
        """
        for _ in range(_DUMP_TRIES):
            entries, interrupted = self._dump_once(what, kind, payload)
            if not interrupted:
                return entries
            log.debug("%s in %s: interrupted by a change, once more", what, self.where)
        raise errors.Unavailable(f"{what} in {self.where}: the table changed under each of "
                                 f"{_DUMP_TRIES} readings")

    def _dump_once(self, what, kind, payload):
        sequence = self._send(what, kind, payload, codec.NLM_F_REQUEST | codec.NLM_F_DUMP)
        entries, interrupted = [], False
        while True:
            for reply in self._receive(what, sequence):
                interrupted = interrupted or bool(reply.flags & codec.NLM_F_DUMP_INTR)
                if reply.type in (codec.NLMSG_DONE, codec.NLMSG_ERROR):
                    self._check(what, reply)
                    return entries, interrupted
                entries.append(reply.payload)

    def _send(self, what, kind, payload, flags):
        self._sequence += 1
        try:
            self._socket.send(codec.message(kind, flags, self._sequence, payload))
        except OSError as exc:
            raise errors.Internal(f"{what} in {self.where}: {exc.strerror or exc}") from exc
        return self._sequence

    def _receive(self, what, sequence):
        """The messages of one datagram that belong to `sequence`; late ones of a request that was
        given up are dropped."""
        try:
            data, _, flags, _ = self._socket.recvmsg(_RECEIVE_BYTES)
        except TimeoutError as exc:
            raise errors.DeadlineExceeded(
                f"{what} in {self.where}: no answer from the kernel for {self._timeout_s:g} s") from exc
        except OSError as exc:
            raise errors.Internal(f"{what} in {self.where}: {exc.strerror or exc}") from exc
        if flags & socket.MSG_TRUNC:
            raise codec.Malformed(f"{what} in {self.where}: an answer of over {_RECEIVE_BYTES} bytes")
        return [reply for reply in codec.messages(data) if reply.sequence == sequence]

    def _check(self, what, reply):
        number, words = codec.acknowledgement(reply)
        if number:
            raise NetlinkError(what, self.where, number, words)


def _open_socket(netns, inode):
    with namespaces.entered(netns, inode):
        sock = _socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
    for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK):
        sock.setsockopt(_SOL_NETLINK, option, 1)
    return sock
