"""Streams between the guest's ports and unix sockets of the host, over the device's two rings.

The muxer never holds more than it must: bytes for the guest stay in the host's socket until the
guest has a buffer and credit for them; bytes from the guest stay in its memory unless the host's
program does not take them, and then within the credit that was given (connection.BUFFER_SIZE). What
is owed to the guest while it offers no buffers is a few bits a connection and a bounded queue of
resets; when that is full, the guest's own packets wait.
"""

import errno
import socket
from collections import deque

from katashim.drivers.vhost_user_vsock import connection as conn
from katashim.drivers.vhost_user_vsock import packet
from katashim.drivers.vhost_user_vsock.connection import ASKED, CLOSED, GREETING, OPEN, ORPHAN, Connection
from katashim.drivers.vhost_user_vsock.loop import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from katashim.drivers.vhost_user_vsock.memory import GuestFault

MAX_CONNECTIONS = 512       # with 256 KiB each: at most 128 MiB when no host program reads
_MAX_RESETS = 256           # owed to the guest, before its packets have to wait
_BATCH = 64                 # packets in one go, for fairness between connections
_RST_WAIT_S = 1             # how long the guest may take to confirm the end of a stream
_FIRST_HOST_PORT = 1 << 30


class Muxer:
    """All connections of one guest.

    :param loop: a Loop. :param cid: the guest's CID.
    :param listener: the listening hybrid vsock, a non-blocking unix socket.
    :param uds_path: its path; the guest's connections go to ``<uds_path>_<port>``.
    :param receive/transmit: the device's Vrings (receive and transmit as the guest's driver sees it).
    :param broken: called with ``(vring, GuestFault)`` when a ring turns out malformed.
    :param log: called with a line of text.
    """

    def __init__(self, loop, cid, listener, uds_path, receive, transmit, broken, log):
        self._loop, self._cid, self._log = loop, cid, log
        self._listener, self._uds_path = listener, uds_path
        self._receive, self._transmit, self._broken = receive, transmit, broken
        self._connections = {}              # (host port, guest port) -> Connection
        self._others = set()                # greeting or orphaned: unknown to the guest
        self._owing = deque()               # connections with `owes` set, each once
        self._resets = deque()              # (host port, guest port)
        self._stalled = set()
        self._transmit_waits = False
        self._next_port = _FIRST_HOST_PORT
        loop.watch(listener.fileno(), EPOLLIN, self._accept)

    def close_all(self, why):
        """Close every connection without a word to the guest, whose side of them is gone."""
        living = [connection for connection in (*self._connections.values(), *self._others)
                  if connection.state is not GREETING]
        for connection in living:
            self._discard(connection)
        self._resets.clear()
        self._owing.clear()
        self._transmit_waits = False
        if living:
            self._log(f"{len(living)} connections closed: {why}")

    def wake(self):
        """Look at both rings, after they were set up or kicked."""
        self.transmit_ready()
        self._resume_stalled()

    # -- guest to host ----------------------------------------------------------------------------
    def transmit_ready(self):
        """Take what the guest transmitted."""
        ring = self._transmit
        taken = 0
        self._transmit_waits = False
        try:
            while len(self._resets) < _MAX_RESETS:
                chain = ring.pop()
                if chain is None:
                    if ring.arm():
                        continue
                    break
                self._take(chain[1])
                ring.push(chain[0])
                taken += 1
                if taken == _BATCH:
                    self._loop.soon(self.transmit_ready)
                    break
            else:
                self._transmit_waits = True
        except GuestFault as fault:
            self._broken(ring, fault)
        if taken:
            ring.notify()
        self._flush()

    def _take(self, views):
        parts = packet.split(views)
        if parts is None:
            self._log("a packet shorter than its header was dropped")
            return
        header, data = parts
        (source, target, guest_port, host_port, length, kind, op, flags, buffer_size, consumed) = header
        if source != self._cid or target != packet.HOST_CID:
            self._log(f"a packet from CID {source} to CID {target} was dropped")
            return
        connection = self._connections.get((host_port, guest_port))
        if kind != packet.TYPE_STREAM:
            self._refuse(connection, host_port, guest_port, op, f"socket type {kind}")
        elif connection is None:
            if op == packet.REQUEST:
                self._connect(host_port, guest_port, buffer_size, consumed)
            elif op != packet.RST:
                self._resets.append((host_port, guest_port))
        else:
            connection.note_credit(buffer_size, consumed)
            if op == packet.RW:
                self._take_data(connection, length, data)
            else:
                self._take_control(connection, op, flags)

    def _refuse(self, connection, host_port, guest_port, op, why):
        """Answer what makes no sense with a reset, and end the connection it was for."""
        self._log(f"host port {host_port}, guest port {guest_port}: {why} in operation {op}")
        if connection is not None:
            self._abort(connection)
        elif op != packet.RST:
            self._resets.append((host_port, guest_port))

    def _take_control(self, connection, op, flags):
        if op == packet.RST:
            self._orphan(connection)
        elif op == packet.RESPONSE and connection.state is ASKED and not connection.owes & conn.OWES_REQUEST:
            self._opened(connection)
        elif op == packet.SHUTDOWN and connection.state is OPEN:
            self._guest_shut(connection, flags)
        elif op == packet.CREDIT_REQUEST:
            self._owe(connection, conn.OWES_CREDIT)
        elif op != packet.CREDIT_UPDATE:
            self._refuse(connection, *connection.key(), op, f"state {connection.state}")
        if connection.state is OPEN:
            self._update(connection)

    def _take_data(self, connection, length, data):
        if connection.state is not OPEN or connection.guest_sent_all:
            return self._refuse(connection, *connection.key(), packet.RW, f"state {connection.state}")
        data = _cut(data, length)
        if data is None:
            return self._refuse(connection, *connection.key(), packet.RW, f"a length of {length}")
        if not connection.receive(length):
            return self._refuse(connection, *connection.key(), packet.RW, "more data than credit")
        if length:
            try:
                connection.send(data)
            except OSError:
                return self._abort(connection)      # the host program closed its end
        self._settle(connection)

    def _guest_shut(self, connection, flags):
        if flags & packet.NO_SEND and not connection.guest_sent_all:
            connection.guest_sent_all = True
            if not connection.backlog:
                connection.finish_sending()
        if flags & packet.NO_RECEIVE and not connection.host_done:
            connection.stop_reading()
        if flags & packet.NO_RECEIVE and connection.guest_sent_all:
            self._finish(connection)

    def _finish(self, connection):
        """All is said on both sides: the reset allows the guest to use the ports again."""
        self._resets.append(connection.key())
        self._orphan(connection)

    def _orphan(self, connection):
        """The guest's side is over; the host program still gets what is in the backlog."""
        if not connection.backlog:
            return self._discard(connection)
        del self._connections[connection.key()]
        self._stalled.discard(connection)
        self._others.add(connection)
        connection.state, connection.owes = ORPHAN, 0
        self._update(connection)

    def _connect(self, host_port, guest_port, buffer_size, consumed):
        """The guest wants to reach a program of the host."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        path = f"{self._uds_path}_{host_port}"
        try:
            if len(self._connections) + len(self._others) >= MAX_CONNECTIONS:
                raise OSError(errno.EMFILE, "too many connections")
            sock.connect(path)
        except OSError as exc:
            sock.close()
            self._log(f"the guest's connection to port {host_port} is refused: {path}: {exc.strerror}")
            self._resets.append((host_port, guest_port))
            return
        connection = Connection(sock, host_port, guest_port, OPEN)
        connection.note_credit(buffer_size, consumed)
        self._connections[connection.key()] = connection
        self._owe(connection, conn.OWES_RESPONSE)
        self._update(connection)

    # -- host to guest ----------------------------------------------------------------------------
    def _accept(self, _events):
        try:
            sock, _ = self._listener.accept()
        except OSError as exc:
            if exc.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                self._log(f"cannot accept a connection: {exc.strerror}")
            return
        if len(self._connections) + len(self._others) >= MAX_CONNECTIONS:
            self._log(f"a connection was refused: there are {MAX_CONNECTIONS} already")
            sock.close()
            return
        sock.setblocking(False)
        connection = Connection(sock, self._free_port(), 0, GREETING)
        self._others.add(connection)
        self._update(connection)

    def _free_port(self):
        used = {port for port, _ in self._connections}
        while True:
            port = self._next_port
            self._next_port = _FIRST_HOST_PORT + (port + 1) % _FIRST_HOST_PORT
            if port not in used:
                return port

    def _greet(self, connection):
        """Read the CONNECT line; when it is there, ask the guest."""
        try:
            line = connection.read_line()
            if line is None:
                return
            verb, port = line.split()
            connection.guest_port = int(port)
            if verb.lower() != b"connect" or not 0 <= connection.guest_port < 1 << 32:
                raise ValueError("no CONNECT line")
        except (OSError, ValueError):
            self._discard(connection)
            return
        connection.state = ASKED
        self._others.discard(connection)
        self._connections[connection.key()] = connection
        self._owe(connection, conn.OWES_REQUEST)
        self._update(connection)
        self._flush()

    def _opened(self, connection):
        connection.state = OPEN
        try:
            connection.sock.send(b"OK %d\n" % connection.host_port)
        except OSError:
            self._abort(connection)

    def _host_event(self, connection, events):
        """epoll's word on the socket of a connection."""
        if connection.state is GREETING:
            return self._greet(connection)
        if connection.state is ASKED:
            if events & (EPOLLHUP | EPOLLERR):
                self._abort(connection)
            return self._flush()
        if events & EPOLLOUT:
            try:
                connection.drain()
            except OSError:
                self._abort(connection)
                return self._flush()
            self._settle(connection)
        if connection.reads_host():
            if events & (EPOLLIN | EPOLLHUP | EPOLLERR):
                self._pump(connection, events & EPOLLHUP)
        elif events & (EPOLLHUP | EPOLLERR) and connection.state is not CLOSED:
            self._abort(connection)
        self._flush()

    def _pump(self, connection, hung_up):
        """Move bytes of the host program into the guest's receive buffers."""
        ring = self._receive
        moved = 0
        try:
            while moved < _BATCH and connection.credit() > 0:
                chain = ring.pop()
                if chain is None:
                    if ring.arm():
                        continue
                    connection.stalled = True
                    self._stalled.add(connection)
                    break
                if not self._fill(connection, ring, chain, hung_up):
                    break
                moved += 1
        except GuestFault as fault:
            self._broken(ring, fault)
        if moved:
            ring.notify()
        if connection.state is OPEN:
            self._update(connection)

    def _fill(self, connection, ring, chain, hung_up):
        """Read into one receive buffer; returns False when the host program has no more for now."""
        head, views = chain
        room = packet.room(views)
        if not room or not any(room):
            raise GuestFault("the receive ring has a buffer without room for data")
        room = _cut(room, connection.credit()) or room
        try:
            count = connection.sock.recvmsg_into(room[:1024])[0]        # IOV_MAX
        except BlockingIOError:
            ring.unpop()
            return False
        except OSError:
            count = 0
        if not count:
            ring.unpop()
            self._host_sent_all(connection, hung_up)
            return False
        packet.put(views, connection.header(self._cid, packet.RW, count))
        connection.sent(count)
        ring.push(head, packet.HEADER_SIZE + count)
        return True

    def _host_sent_all(self, connection, hung_up):
        connection.host_done = True
        connection.shutdown_flags = packet.NO_SEND
        if hung_up or connection.guest_sent_all:
            connection.shutdown_flags |= packet.NO_RECEIVE
            self._loop.later(_RST_WAIT_S, self._expire, connection)
        self._owe(connection, conn.OWES_SHUTDOWN)

    def _expire(self, connection):
        """Both ends were told that it is over; the guest's confirmation is overdue."""
        if connection.state is OPEN:
            self._finish(connection)
            self._flush()

    # -- what the guest is owed -------------------------------------------------------------------
    def _owe(self, connection, what):
        connection.owes |= what
        if not connection.queued:
            connection.queued = True
            self._owing.append(connection)

    def _flush(self):
        """Send what is owed, as far as the guest has buffers."""
        ring = self._receive
        sent = 0
        try:
            while self._resets or self._owing:
                chain = ring.pop()
                if chain is None:
                    if ring.arm():
                        continue
                    break
                head, views = chain
                if packet.room(views) is None:
                    raise GuestFault("the receive ring has a buffer without room for a header")
                header = self._next_header()
                if header is None:
                    ring.unpop()
                    break
                packet.put(views, header)
                ring.push(head, packet.HEADER_SIZE)
                sent += 1
        except GuestFault as fault:
            self._broken(ring, fault)
        if sent:
            ring.notify()
        if self._transmit_waits and len(self._resets) < _MAX_RESETS:
            self._transmit_waits = False
            self._loop.soon(self.transmit_ready)

    def _next_header(self):
        if self._resets:
            host_port, guest_port = self._resets.popleft()
            return packet.HEADER.pack(packet.HOST_CID, self._cid, host_port, guest_port, 0,
                                      packet.TYPE_STREAM, packet.RST, 0, 0, 0)
        while self._owing:
            connection = self._owing[0]
            header = connection.next_owed(self._cid) if connection.owes else None
            if not connection.owes:
                self._owing.popleft()
                connection.queued = False
            if header is not None:
                return header
        return None

    def receive_ready(self):
        """The guest has offered receive buffers again."""
        self._flush()
        self._resume_stalled()

    def _resume_stalled(self):
        stalled, self._stalled = self._stalled, set()
        for connection in stalled:
            connection.stalled = False
            self._update(connection)

    # -- the ends of a connection -----------------------------------------------------------------
    def _settle(self, connection):
        """After bytes went to the host program: pass on an end, a credit, and what epoll is to watch."""
        if connection.owes & conn.OWES_CREDIT:
            self._owe(connection, conn.OWES_CREDIT)
        if not connection.backlog:
            if connection.state is ORPHAN:
                return self._discard(connection)
            if connection.guest_sent_all:
                connection.finish_sending()
        self._update(connection)

    def _update(self, connection):
        """Have epoll watch what the connection waits for."""
        wanted = connection.interest()
        if wanted == connection.watched:
            return
        if wanted is None:
            self._loop.forget(connection.fd)
        elif connection.watched is None:
            self._loop.watch(connection.fd, wanted,
                             lambda events: self._host_event(connection, events))
        else:
            self._loop.change(connection.fd, wanted)
        connection.watched = wanted

    def _abort(self, connection):
        """End a connection and tell the guest, if it has heard of it."""
        known = self._connections.get(connection.key()) is connection
        if known and not connection.owes & conn.OWES_REQUEST:
            self._resets.append(connection.key())
        self._discard(connection)

    def _discard(self, connection):
        """End a connection without a word to the guest."""
        if connection.state is CLOSED:
            return
        if self._connections.get(connection.key()) is connection:
            del self._connections[connection.key()]
        self._others.discard(connection)
        self._stalled.discard(connection)
        connection.state, connection.owes = CLOSED, 0
        if connection.watched is not None:
            self._loop.forget(connection.fd)
            connection.watched = None
        self._loop.close_later(connection.sock)


def _cut(views, length):
    """The first `length` bytes of `views`, or None when there are fewer."""
    if len(views) == 1 and len(views[0]) >= length:
        return [views[0][:length]]
    found = []
    for view in views:
        if not length:
            break
        part = view[:length]
        length -= len(part)
        found.append(part)
    return None if length else found
