"""The vring and the guest's memory against an oracle: what may be read, what must be refused."""

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vsock_guest import (
    FILE_OFFSET,
    GUEST_BASE,
    INDIRECT,
    NEXT,
    USER_BASE,
    WRITE,
    Memory,
    Ring,
)

from katashim.drivers.vhost_user_vsock import packet
from katashim.drivers.vhost_user_vsock.memory import GuestFault, GuestMemory, Region
from katashim.drivers.vhost_user_vsock.vring import MAX_INDIRECT, Vring

SIZE = 64 << 10
HALF = SIZE // 2
RING_SIZE = 8


class Machine:
    """Guest memory in two regions, and one ring at its beginning."""

    def __init__(self, writable):
        self.memory = Memory(SIZE)
        self.driver = Ring(self.memory, 0, GUEST_BASE, GUEST_BASE + 4096, RING_SIZE)
        self.vring = Vring("test", writable)
        self.vring.size = RING_SIZE
        self.vring.addresses = tuple(
            USER_BASE + at - GUEST_BASE
            for at in (self.driver.descriptors, self.driver.used, self.driver.available))
        self.vring.start(GuestMemory(
            Region(GUEST_BASE + start, HALF, USER_BASE + start, FILE_OFFSET + start, self.memory.fd)
            for start in (0, HALF)))

    def close(self):
        self.vring.stop()
        self.driver.close()
        self.memory.close()


@pytest.fixture(params=[True, False], ids=["writable", "readable"])
def machine(request):
    machine = Machine(request.param)
    yield machine
    assert machine.memory.guards_are_untouched()
    machine.close()


def oracle(memory, head, writable):
    """The bytes' addresses of a chain, by a second reading of VIRTIO 1.2 section 2.7; None if malformed."""
    table, entries = GUEST_BASE, RING_SIZE
    addresses, index, inside, steps = [], head, False, 0
    while True:
        if index >= entries or steps >= entries:
            return None
        address, length, flags, following = struct.unpack("<QIHH", memory.get(table + 16 * index, 16))
        if flags & INDIRECT:
            legal = (not inside and not flags & NEXT and length % 16 == 0
                     and 0 < length <= 16 * MAX_INDIRECT and in_memory(address, length))
            if not legal:
                return None
            table, entries, index, inside, steps = address, length // 16, 0, True, 0
            continue
        if bool(flags & WRITE) != writable or (length and not in_memory(address, length)):
            return None
        addresses.append((address, length))
        steps += 1
        if not flags & NEXT:
            return addresses
        index = following


def in_memory(address, length):
    return GUEST_BASE <= address and address + length <= GUEST_BASE + SIZE


ADDRESSES = st.one_of(
    st.integers(GUEST_BASE, GUEST_BASE + SIZE),
    st.sampled_from([GUEST_BASE - 1, GUEST_BASE + HALF - 8, GUEST_BASE + SIZE - 1, 0, (1 << 64) - 1,
                     GUEST_BASE + 8192]))
LENGTHS = st.one_of(st.integers(0, 64).map(lambda n: 16 * n), st.integers(0, SIZE + 1),
                    st.sampled_from([0xffffffff, 1 << 20]))
FLAGS = st.one_of(st.sampled_from([0, NEXT, WRITE, WRITE | NEXT, INDIRECT]), st.integers(0, 7),
                  st.integers(0, 0xffff))
DESCRIPTORS = st.lists(st.tuples(ADDRESSES, LENGTHS, FLAGS, st.integers(0, RING_SIZE + 1)),
                       min_size=1, max_size=RING_SIZE)


@settings(max_examples=400, deadline=None)
@given(writable=st.booleans(), main=DESCRIPTORS, table=DESCRIPTORS, head=st.integers(0, RING_SIZE + 1))
def test_any_chain_is_taken_or_refused_as_the_specification_says(writable, main, table, head):
    machine = Machine(writable)
    try:
        for slot, descriptor in enumerate(main):
            machine.driver.describe(slot, *descriptor)
        machine.memory.put(GUEST_BASE + 8192, b"".join(struct.pack("<QIHH", *d) for d in table))
        machine.driver.offer(head)
        expected = oracle(machine.memory, head, writable) if head < RING_SIZE else None
        if expected is None:
            with pytest.raises(GuestFault):
                machine.vring.pop()
        else:
            got_head, views = machine.vring.pop()
            assert got_head == head
            assert sum(map(len, views)) == sum(length for _, length in expected)
            total = sum(length for _, length in expected)
            if total <= SIZE:
                want = b"".join(machine.memory.get(a, n) for a, n in expected)
                assert b"".join(views) == want
            del views
    finally:
        machine.close()


@settings(max_examples=300, deadline=None)
@given(contents=st.binary(min_size=RING_SIZE * 16 + 6 + 2 * RING_SIZE,
                          max_size=RING_SIZE * 16 + 6 + 2 * RING_SIZE),
       writable=st.booleans(), event_idx=st.booleans())
def test_random_rings_never_change_anything_but_the_used_ring(contents, writable, event_idx):
    machine = Machine(writable)
    try:
        machine.vring.event_idx = event_idx
        machine.vring.call_fd = machine.driver.call
        machine.memory.put(GUEST_BASE, contents)
        before = bytearray(machine.memory.map)
        popped = 0
        try:
            while (chain := machine.vring.pop()) is not None:
                machine.vring.push(chain[0], 0)
                popped += 1
                del chain
        except GuestFault:
            pass
        machine.vring.arm()
        machine.vring.notify()
        assert popped <= RING_SIZE
        used = machine.driver.used - GUEST_BASE + FILE_OFFSET
        end = used + 6 + 8 * RING_SIZE
        after = machine.memory.map
        assert after[:used] == before[:used] and after[end:] == before[end:]
        assert machine.driver.used_index() == popped
    finally:
        machine.close()


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=6), fill=st.binary(min_size=512, max_size=512))
def test_headers_in_pieces(lengths, fill):
    storage = bytearray(fill)
    views, at = [], 0
    for length in lengths:
        views.append(memoryview(storage)[at:at + length])
        at += length
    parts = packet.split(views)
    room = packet.room(views)
    if at < packet.HEADER_SIZE:
        assert parts is None and room is None
        return
    assert parts[0] == packet.HEADER.unpack(fill[:packet.HEADER_SIZE])
    assert b"".join(parts[1]) == fill[packet.HEADER_SIZE:at] == b"".join(room)
    header = bytes(range(packet.HEADER_SIZE))
    packet.put(views, header)
    assert storage == header + fill[packet.HEADER_SIZE:]


def test_a_chain_comes_again_after_unpop(machine):
    flag = WRITE if machine.vring._flag else 0
    machine.driver.describe(3, GUEST_BASE + 4096, 100, flag)
    machine.driver.offer(3)
    first = machine.vring.pop()
    machine.vring.unpop()
    again = machine.vring.pop()
    assert first[0] == again[0] == 3 and len(first[1][0]) == 100
    assert machine.vring.pop() is None
    machine.vring.push(3, 7)
    assert machine.driver.take() == (3, 7)


def test_indices_wrap(machine):
    flag = WRITE if machine.vring._flag else 0
    machine.driver.describe(0, GUEST_BASE + 4096, 10, flag)
    for turn in range(70_000):
        machine.driver.offer(0)
        head, _ = machine.vring.pop()
        machine.vring.push(head, turn & 0xff)
    assert machine.driver.used_index() == 70_000 & 0xffff


@pytest.mark.parametrize("event_idx", [True, False])
def test_notifications_are_suppressed_as_the_driver_asks(machine, event_idx):
    vring, driver = machine.vring, machine.driver
    vring.event_idx, vring.call_fd = event_idx, driver.call
    flag = WRITE if vring._flag else 0
    driver.describe(0, GUEST_BASE + 4096, 10, flag)

    def interrupted_after_one():
        driver.offer(0)
        vring.push(vring.pop()[0])
        vring.notify()
        try:
            return os.eventfd_read(driver.call) == 1
        except BlockingIOError:
            return False

    def wish(event, flags):
        if event_idx:
            machine.memory.put(driver.available + 4 + 2 * RING_SIZE, struct.pack("<H", event))
        else:
            machine.memory.put(driver.available, struct.pack("<H", flags))

    wish(0, 0)
    assert interrupted_after_one()
    wish(5, 1)
    assert not interrupted_after_one()
    wish(2, 0)
    assert interrupted_after_one()


def test_arm_tells_what_came_in_between(machine):
    machine.vring.event_idx = True
    assert not machine.vring.arm()
    machine.driver.describe(0, GUEST_BASE + 4096, 10, WRITE if machine.vring._flag else 0)
    machine.driver.offer(0)
    assert machine.vring.arm()
    machine.vring.pop()
    assert not machine.vring.arm()
    wanted = machine.memory.get(machine.driver.used + 4 + 8 * RING_SIZE, 2)
    assert struct.unpack("<H", wanted)[0] == 1


def test_a_region_of_a_closed_or_short_file(machine):
    with pytest.raises(GuestFault, match="shorter file"):
        Region(0, SIZE * 2, 0, FILE_OFFSET, machine.memory.fd)
    with pytest.raises(GuestFault):
        Region(0, 0, 0, 0, machine.memory.fd)
    with pytest.raises(GuestFault):
        Region((1 << 64) - 1, 4096, 0, 0, machine.memory.fd)
    with pytest.raises(GuestFault, match="cannot be mapped"):
        Region(0, 4096, 0, 0, 1 << 20)
