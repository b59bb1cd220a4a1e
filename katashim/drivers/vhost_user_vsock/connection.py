"""One stream between a socket of the host and a port of the guest: its state, credit and backlog."""

import socket

from katashim.drivers.vhost_user_vsock import packet
from katashim.drivers.vhost_user_vsock.loop import EPOLLIN, EPOLLOUT

# What a guest may have under way to a host program that does not read; all of it may end up in this
# process's memory, so the number of connections bounds the whole (muxer.MAX_CONNECTIONS).
BUFFER_SIZE = 256 * 1024
# Tell the guest of freed buffer space when it amounts to this much.
CREDIT_STEP = BUFFER_SIZE // 4

GREETING = "greeting"       # a host program connected and has not finished its CONNECT line
ASKED = "asked"             # the guest has been, or is about to be, asked
OPEN = "open"
ORPHAN = "orphan"           # the guest is done with it; the host still has to take the backlog
CLOSED = "closed"

# What a connection owes the guest: bits, sent in this order when the guest offers buffers.
OWES_REQUEST, OWES_RESPONSE, OWES_CREDIT, OWES_SHUTDOWN = 1, 2, 4, 8

_MASK = 0xffffffff
_NOT_WATCHED = None


class Connection:
    """State and arithmetic only; the muxer moves the bytes.

    :ivar host_port/guest_port: the stream's name towards the guest. :ivar line: the CONNECT line so far.
    :ivar owes: bits of what is to be told to the guest. :ivar queued: it stands in the muxer's queue.
    :ivar stalled: there was no receive buffer for its data.
    :ivar host_done: nothing more comes from the host program.
    :ivar guest_sent_all: nothing more comes from the guest.
    """

    __slots__ = ("_announced", "_consumed", "_forwarded", "_peer_buffer", "_received", "_sent", "backlog",
                 "fd", "guest_port", "guest_sent_all", "host_done", "host_port", "line", "owes", "queued",
                 "shutdown_flags", "sock", "stalled", "state", "watched")

    def __init__(self, sock, host_port, guest_port, state):
        self.sock, self.fd = sock, sock.fileno()
        self.host_port, self.guest_port, self.state = host_port, guest_port, state
        self.line = b""
        self.owes = 0
        self.queued = self.stalled = self.host_done = self.guest_sent_all = False
        self.shutdown_flags = 0
        self.watched = _NOT_WATCHED
        self.backlog = bytearray()          # from the guest, for the host program
        self._sent = self._consumed = self._peer_buffer = 0             # host to guest
        self._received = self._forwarded = self._announced = 0          # guest to host

    def __repr__(self):
        return f"the connection of host port {self.host_port} with guest port {self.guest_port}"

    def key(self):
        return self.host_port, self.guest_port

    # -- credit -----------------------------------------------------------------------------------
    def note_credit(self, buffer_size, consumed):
        """The guest's view of its own buffer, from any header.

        A count that runs backwards is stale (Linux fills in headers before it orders packets), one
        that runs ahead of what was sent is a lie; neither changes anything.
        """
        self._peer_buffer = buffer_size
        if (consumed - self._consumed) & _MASK <= (self._sent - self._consumed) & _MASK:
            self._consumed = consumed

    def credit(self):
        """How many bytes the guest is ready to take; not above 0 when it is full."""
        return self._peer_buffer - ((self._sent - self._consumed) & _MASK)

    def sent(self, count):
        self._sent = (self._sent + count) & _MASK

    def receive(self, count):
        """Account for a packet's bytes; returns False when the guest had no credit for them."""
        self._received += count
        return self._received - self._forwarded <= BUFFER_SIZE

    def forwarded(self, count):
        """The host program took `count` bytes; the guest hears of it when it is worth a packet."""
        self._forwarded += count
        if self._forwarded - self._announced >= CREDIT_STEP:
            self.owes |= OWES_CREDIT

    # -- what the guest and epoll are told --------------------------------------------------------
    def header(self, cid, op, length=0, flags=0):
        """A packed header from this connection to the guest; announces the credit."""
        self._announced = self._forwarded
        self.owes &= ~OWES_CREDIT
        return packet.HEADER.pack(packet.HOST_CID, cid, self.host_port, self.guest_port, length,
                                  packet.TYPE_STREAM, op, flags, BUFFER_SIZE, self._forwarded & _MASK)

    def next_owed(self, cid):
        """The header of the next thing owed."""
        if self.owes & OWES_REQUEST:
            self.owes &= ~OWES_REQUEST
            return self.header(cid, packet.REQUEST)
        if self.owes & OWES_RESPONSE:
            self.owes &= ~OWES_RESPONSE
            return self.header(cid, packet.RESPONSE)
        if self.owes & OWES_CREDIT:
            return self.header(cid, packet.CREDIT_UPDATE)
        self.owes &= ~OWES_SHUTDOWN
        return self.header(cid, packet.SHUTDOWN, flags=self.shutdown_flags)

    def reads_host(self):
        """Whether bytes from the host program can be passed on now."""
        return self.state is OPEN and not self.host_done and not self.stalled and self.credit() > 0

    def interest(self):
        """The epoll events it waits for, or None not to be watched at all.

        A socket whose other end is gone reports EPOLLHUP for ever. So one that may not be read
        now, for want of credit or buffers, is not watched; one with nothing left to read is watched
        for just that event.
        """
        if self.state is GREETING:
            return EPOLLIN
        if self.state is ASKED:
            return 0
        events = EPOLLOUT if self.backlog else 0
        if self.state is OPEN and self.reads_host():
            events |= EPOLLIN
        if events:
            return events
        waits_for_end = self.state is OPEN and self.host_done and not self.shutdown_flags & packet.NO_RECEIVE
        return 0 if waits_for_end else _NOT_WATCHED

    # -- the host's socket ------------------------------------------------------------------------
    def send(self, views):
        """Hand `views` to the host program; what it does not take now goes to the backlog.

        :raises OSError: the program is gone.
        """
        taken = 0
        if not self.backlog:
            try:
                taken = self.sock.sendmsg(views[:1024])         # IOV_MAX
            except BlockingIOError:
                pass
            if taken:
                self.forwarded(taken)
        for view in views:
            if taken >= len(view):
                taken -= len(view)
            else:
                self.backlog += view[taken:]
                taken = 0

    def drain(self):
        """Hand the backlog on as far as it goes. :raises OSError: the program is gone."""
        while self.backlog:
            try:
                taken = self.sock.send(self.backlog)
            except BlockingIOError:
                return
            del self.backlog[:taken]
            self.forwarded(taken)

    def read_line(self):
        """Read towards the end of the CONNECT line and not a byte further.

        :returns: the line without its end, or None when it is not complete yet.
        :raises OSError: the peer is gone. :raises ValueError: no line of a sensible length.
        """
        try:
            waiting = self.sock.recv(64, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        if not waiting:
            raise ConnectionResetError("closed before its CONNECT line was complete")
        end = waiting.find(b"\n") + 1
        self.line += self.sock.recv(end or len(waiting))
        if len(self.line) > 64:
            raise ValueError("no CONNECT line")
        return self.line[:-1] if end else None

    def finish_sending(self):
        """Tell the host program that no more will come."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass                            # it is gone altogether, which reading will show

    def stop_reading(self):
        """Tell the host program that what it sends is not wanted any more."""
        self.host_done = True
        try:
            self.sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass
