"""A guest's vsock driver and QEMU's half of vhost-user in one, for tests of our device.

The guest's memory is a memfd; the rings and buffers in it are laid out by hand, so that tests can
also lay them out wrongly. It speaks to the device only by the vhost-user socket, the eventfds and
the memory, as QEMU and Linux do.
"""

import mmap
import os
import select
import socket
import struct
import time

HEADER = struct.Struct("<QQIIIHHIII")
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)

NEXT, WRITE, INDIRECT = 1, 2, 4
VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC = 1 << 32, 1 << 30, 1 << 29, 1 << 28

GUEST_BASE = 0x4000_0000
USER_BASE = 0x7f12_0000_0000
FILE_OFFSET = 0x3000
MEMORY_SIZE = 8 << 20
RING_SIZE = 128
BUFFER_SIZE = 4096 + 44
DEADLINE_S = 10

GET_FEATURES, SET_FEATURES, SET_OWNER = 1, 2, 3
SET_MEM_TABLE, SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 5, 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, SET_VRING_ENABLE, GET_CONFIG = 15, 16, 18, 24
GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG = 36, 37, 38


class Packet:
    """One packet as the guest sees it."""

    def __init__(self, raw):
        (self.source, self.target, self.host_port, self.guest_port, self.length, self.kind, self.op,
         self.flags, self.buffer_size, self.consumed) = HEADER.unpack_from(raw)
        self.data = raw[HEADER.size:]

    def __repr__(self):
        return (f"<op {self.op} host port {self.host_port} guest port {self.guest_port} "
                f"flags {self.flags} {len(self.data)} bytes>")


class Ring:
    """The driver's side of a split ring at guest address `at`, with a slot of memory for each entry."""

    def __init__(self, memory, index, at, buffers, size=RING_SIZE):
        self.memory, self.index, self.size = memory, index, size
        self.descriptors, self.available = at, at + 16 * size
        self.used = (self.available + 6 + 2 * size + 3) & ~3
        self.buffers = buffers
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.error = os.eventfd(0, os.EFD_NONBLOCK)
        self.offered = self.seen = 0

    def close(self):
        for fd in (self.kick, self.call, self.error):
            os.close(fd)

    def buffer(self, slot):
        return self.buffers + slot * (BUFFER_SIZE + 52)

    def describe(self, slot, address, length, flags=0, following=0):
        self.memory.put(self.descriptors + 16 * slot,
                        struct.pack("<QIHH", address, length, flags, following))

    def offer(self, head):
        """Make a chain available; the kick is the caller's."""
        self.memory.put(self.available + 4 + 2 * (self.offered % self.size), struct.pack("<H", head))
        self.offered = (self.offered + 1) & 0xffff
        self.memory.put(self.available + 2, struct.pack("<H", self.offered))

    def used_index(self):
        return struct.unpack("<H", self.memory.get(self.used + 2, 2))[0]

    def take(self):
        """The next used element ``(head, length)`` or None."""
        if self.used_index() == self.seen:
            return None
        at = self.used + 4 + 8 * (self.seen % self.size)
        self.seen = (self.seen + 1) & 0xffff
        # With EVENT_IDX: interrupt for the very next one.
        self.memory.put(self.available + 4 + 2 * self.size, struct.pack("<H", self.seen))
        return struct.unpack("<II", self.memory.get(at, 8))


class Memory:
    """Guest memory in a memfd, with a guard before and behind that nobody may touch."""

    def __init__(self, size=MEMORY_SIZE):
        self.size = size
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, FILE_OFFSET + size + mmap.PAGESIZE)
        self.map = mmap.mmap(self.fd, 0)
        self.map[:FILE_OFFSET] = b"\xa5" * FILE_OFFSET
        self.map[FILE_OFFSET + size:] = b"\x5a" * mmap.PAGESIZE

    def close(self):
        self.map.close()
        os.close(self.fd)

    def put(self, address, data):
        at = address - GUEST_BASE + FILE_OFFSET
        self.map[at:at + len(data)] = data

    def get(self, address, length):
        at = address - GUEST_BASE + FILE_OFFSET
        return self.map[at:at + length]

    def guards_are_untouched(self):
        return (self.map[:FILE_OFFSET] == b"\xa5" * FILE_OFFSET
                and self.map[FILE_OFFSET + self.size:] == b"\x5a" * mmap.PAGESIZE)

    def table(self):
        """The payload of SET_MEM_TABLE for this memory."""
        return struct.pack("<II", 1, 0) + struct.pack(
            "<QQQQ", GUEST_BASE, self.size, USER_BASE, FILE_OFFSET)


class Guest:
    """Connects to the device's vhost-user socket as QEMU and drives the two rings as Linux.

    :param path: the vhost-user socket. :param cid: the guest's CID.
    """

    def __init__(self, path, cid, event_idx=True):
        self.cid = cid
        self.memory = Memory()
        self.event_idx = event_idx
        ring_area = 64 * 1024
        self.receive = Ring(self.memory, 0, GUEST_BASE, GUEST_BASE + 1 * (1 << 20))
        self.transmit = Ring(self.memory, 1, GUEST_BASE + ring_area, GUEST_BASE + 3 * (1 << 20))
        self.free_slots = list(range(self.transmit.size))
        self.sent, self.consumed, self.buffer_size = {}, {}, 256 * 1024
        self.device_credit = {}             # (host port, guest port) -> (buffer size, consumed)
        self.inbox = []
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect(path)

    def close(self):
        self.sock.close()
        self.receive.close()
        self.transmit.close()
        self.memory.close()

    # -- vhost-user -------------------------------------------------------------------------------
    def tell(self, request, payload=b"", fds=(), flags=1):
        message = struct.pack("<III", request, flags, len(payload)) + payload
        socket.send_fds(self.sock, [message], list(fds))

    def ask(self, request, payload=b"", fds=(), flags=1):
        self.tell(request, payload, fds, flags)
        return self.answer(request)

    def answer(self, request):
        header = self._exactly(12)
        number, flags, size = struct.unpack("<III", header)
        assert (number, flags) == (request, 5)
        return self._exactly(size)

    def _exactly(self, count):
        data = b""
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            assert part, "the device closed the connection"
            data += part
        return data

    def acknowledged(self, request, payload=b"", fds=()):
        """Send a request that wants an answer; True when the device agrees."""
        return struct.unpack("<Q", self.ask(request, payload, fds, flags=9))[0] == 0

    def negotiate(self):
        offered = struct.unpack("<Q", self.ask(GET_FEATURES))[0]
        self.protocol_offered = struct.unpack("<Q", self.ask(GET_PROTOCOL_FEATURES))[0]
        self.tell(SET_PROTOCOL_FEATURES, struct.pack("<Q", self.protocol_offered))
        self.tell(SET_OWNER)
        wanted = VERSION_1 | PROTOCOL_FEATURES | INDIRECT_DESC | (EVENT_IDX if self.event_idx else 0)
        assert offered & wanted == wanted
        self.tell(SET_FEATURES, struct.pack("<Q", wanted))

    def share_memory(self):
        assert self.acknowledged(SET_MEM_TABLE, self.memory.table(), [self.memory.fd])

    def start_ring(self, ring, base=None):
        self.tell(SET_VRING_NUM, struct.pack("<II", ring.index, ring.size))
        self.tell(SET_VRING_BASE, struct.pack("<II", ring.index, ring.seen if base is None else base))
        self.tell(SET_VRING_ADDR, struct.pack(
            "<IIQQQQ", ring.index, 0, *(USER_BASE + a - GUEST_BASE for a in
                                        (ring.descriptors, ring.used, ring.available)), 0))
        self.tell(SET_VRING_CALL, struct.pack("<Q", ring.index), [ring.call])
        self.tell(SET_VRING_ERR, struct.pack("<Q", ring.index), [ring.error])
        return self.acknowledged(SET_VRING_KICK, struct.pack("<Q", ring.index), [ring.kick])

    def stop_ring(self, ring):
        """Returns the next available index, as the device says."""
        index, base = struct.unpack("<II", self.ask(GET_VRING_BASE, struct.pack("<II", ring.index, 0)))
        assert index == ring.index
        return base

    def boot(self):
        self.negotiate()
        self.share_memory()
        assert self.start_ring(self.receive)
        assert self.start_ring(self.transmit)
        self.offer_buffers()

    def restart(self):
        """The guest resets the device and sets it up as a fresh driver does."""
        for ring in (self.receive, self.transmit):
            self.stop_ring(ring)
            self.memory.put(ring.descriptors, bytes(ring.used - ring.descriptors + 6 + 8 * ring.size))
            ring.offered = ring.seen = 0
        self.free_slots = list(range(self.transmit.size))
        self.inbox.clear()
        assert self.start_ring(self.receive)
        assert self.start_ring(self.transmit)
        self.offer_buffers()

    # -- the receive ring -------------------------------------------------------------------------
    def offer_buffers(self, count=None):
        for slot in range(self.receive.size if count is None else count):
            self.offer_buffer(slot)
        os.eventfd_write(self.receive.kick, 1)

    def offer_buffer(self, slot):
        self.receive.describe(slot, self.receive.buffer(slot), BUFFER_SIZE, WRITE)
        self.receive.offer(slot)

    def poll(self, refill=True):
        """Move what was used to the inbox; returns whether there was anything."""
        found = False
        while (used := self.receive.take()) is not None:
            slot, length = used
            packet = Packet(self.memory.get(self.receive.buffer(slot), length))
            assert packet.source == 2 and packet.target == self.cid and packet.kind == 1
            assert packet.length == len(packet.data)
            self.device_credit[packet.host_port, packet.guest_port] = packet.buffer_size, packet.consumed
            self.inbox.append(packet)
            if refill:
                self.offer_buffer(slot)
            found = True
        if found and refill:
            os.eventfd_write(self.receive.kick, 1)
        while (used := self.transmit.take()) is not None:
            self.free_slots.append(used[0])
        return found

    def get(self, what="a packet", matching=lambda packet: True, refill=True):
        """The next packet that matches; the others stay in the inbox."""
        end = time.monotonic() + DEADLINE_S
        while True:
            self.poll(refill)
            for packet in self.inbox:
                if matching(packet):
                    self.inbox.remove(packet)
                    return packet
            self._wait(end, what)

    def get_op(self, op, refill=True):
        return self.get(f"operation {op}", lambda packet: packet.op == op, refill)

    def _wait(self, end, what):
        ready, _, _ = select.select([self.receive.call, self.transmit.call], [], [],
                                    max(0, end - time.monotonic()))
        assert ready, f"nothing after {DEADLINE_S} s while waiting for {what}; inbox: {self.inbox[:5]}"
        for fd in ready:
            os.eventfd_read(fd)

    # -- the transmit ring ------------------------------------------------------------------------
    def send(self, op, host_port, guest_port, data=b"", *, flags=0, kind=1, source=None, target=2,
             length=None, consumed=None, kick=True):
        """Transmit one packet of at most 4 KiB of data."""
        key = host_port, guest_port
        header = HEADER.pack(self.cid if source is None else source, target, guest_port, host_port,
                             len(data) if length is None else length, kind, op, flags, self.buffer_size,
                             self.consumed.get(key, 0) if consumed is None else consumed)
        slot = self.free_slot()
        address = self.transmit.buffer(slot)
        self.memory.put(address, header + data)
        self.transmit.describe(slot, address, HEADER.size + len(data))
        self.transmit.offer(slot)
        self.sent[key] = self.sent.get(key, 0) + len(data)
        if kick:
            os.eventfd_write(self.transmit.kick, 1)

    def free_slot(self):
        end = time.monotonic() + DEADLINE_S
        while not self.free_slots:
            self.poll()
            if not self.free_slots:
                os.eventfd_write(self.transmit.kick, 1)
                self._wait(end, "a free transmit slot")
        return self.free_slots.pop()

    # -- streams ----------------------------------------------------------------------------------
    def accept(self):
        """Answer the device's next REQUEST; returns ``(host port, guest port)``."""
        request = self.get_op(REQUEST)
        key = request.host_port, request.guest_port
        self.send(RESPONSE, *key)
        return key

    def credit(self, key):
        buffer_size, consumed = self.device_credit[key]
        return buffer_size - (self.sent.get(key, 0) - consumed)

    def write(self, key, data):
        """Send a stream's bytes within the credit, as Linux does."""
        view = memoryview(data)
        while view:
            room = min(self.credit(key), 4096)
            if room <= 0:
                os.eventfd_write(self.transmit.kick, 1)
                packet = self.get("credit")
                assert packet.op == CREDIT_UPDATE, packet
                continue
            self.send(RW, *key, bytes(view[:room]), kick=len(self.free_slots) < 8)
            view = view[room:]
        os.eventfd_write(self.transmit.kick, 1)

    def read(self, key, count):
        """Receive `count` bytes of a stream, returning credit as Linux does."""
        data = bytearray()
        announced = 0
        while len(data) < count:
            packet = self.get("data", lambda packet: packet.op == RW)
            data += packet.data
            self.consumed[key] = (self.consumed.get(key, 0) + len(packet.data)) & 0xffffffff
            if len(data) - announced >= self.buffer_size // 4:
                self.send(CREDIT_UPDATE, *key)
                announced = len(data)
        return bytes(data)

    def read_of(self, key, count):
        """Like `read`, for one of several streams, without returning credit."""
        data = b""
        while len(data) < count:
            data += self.get("data", lambda packet: packet.op == RW
                             and (packet.host_port, packet.guest_port) == key).data
        return data

    def wait_for_the_device(self):
        """Until it interrupts for one of the rings."""
        self._wait(time.monotonic() + DEADLINE_S, "the device")

    def hears_nothing(self, seconds):
        """Whether the device leaves the receive ring alone for so long."""
        before = self.receive.used_index()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self.receive.used_index() == before:
            if select.select([self.receive.call], [], [], left)[0]:
                os.eventfd_read(self.receive.call)
        return self.receive.used_index() == before
