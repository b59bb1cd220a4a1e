"""The vsock device as a process: the frontend's protocol, bad guests, and its own beginning and end."""

import os
import random
import resource
import select
import struct
import subprocess
import sys

import pytest
import vsock_guest as g
from vsock_guest import GUEST_BASE, USER_BASE, Guest
from vsock_process import MAIN, Process, exactly, is_closed, read_line


@pytest.fixture
def process(tmp_path):
    process = Process(str(tmp_path))
    yield process
    process.close()


@pytest.fixture
def guest(process):
    guest = Guest(process.vhost_path, 42)
    guest.boot()
    yield guest
    assert guest.memory.guards_are_untouched()
    guest.close()


def connect(process, guest, port=1024):
    sock = process.dial(port)
    key = guest.accept()
    assert read_line(sock) == b"OK %d\n" % key[0]
    return sock, key


def works(process, guest):
    """Whether a stream can be opened and carries bytes."""
    sock, key = connect(process, guest)
    with sock:
        sock.sendall(b"ping")
        assert guest.read(key, 4) == b"ping"
        guest.write(key, b"pong")
        return exactly(sock, 4) == b"pong"


def is_broken(guest, ring):
    """Wait for the word that the device has shut a ring."""
    ready, _, _ = select.select([ring.error], [], [], g.DEADLINE_S)
    return bool(ready) and os.eventfd_read(ring.error) == 1


# -- the frontend's protocol ----------------------------------------------------------------------
def test_the_configuration_space_is_the_cid(process):
    guest = Guest(process.vhost_path, 42)
    guest.negotiate()
    reply = guest.ask(g.GET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8))
    assert reply == struct.pack("<IIIQ", 0, 8, 0, 42)
    assert guest.ask(g.GET_CONFIG, struct.pack("<III", 4, 8, 0) + bytes(8)) == b""
    guest.close()


def test_an_unknown_request_is_answered_with_failure(process, guest):
    assert not guest.acknowledged(99)
    assert not guest.acknowledged(g.SET_VRING_NUM, struct.pack("<II", 7, 128))
    assert not guest.acknowledged(g.SET_VRING_NUM, b"short")
    assert not guest.acknowledged(g.SET_FEATURES, struct.pack("<Q", 1 << 63))
    assert works(process, guest)


@pytest.mark.parametrize("size", [0, 3, 65536, 1 << 31])
def test_an_impossible_ring_size_is_refused(process, size):
    guest = Guest(process.vhost_path, 42)
    guest.negotiate()
    assert not guest.acknowledged(g.SET_VRING_NUM, struct.pack("<II", 0, size))
    guest.close()


@pytest.mark.parametrize("addresses", [
    (USER_BASE - 16, USER_BASE + 4096, USER_BASE + 8192),
    (USER_BASE + g.MEMORY_SIZE - 16, USER_BASE + 4096, USER_BASE + 8192),
    (USER_BASE, USER_BASE + g.MEMORY_SIZE - 8, USER_BASE + 8192),
    (USER_BASE, USER_BASE + 4096, (1 << 64) - 8)])
def test_a_ring_outside_the_memory_is_refused(process, addresses):
    guest = Guest(process.vhost_path, 42)
    guest.negotiate()
    guest.share_memory()
    guest.tell(g.SET_VRING_NUM, struct.pack("<II", 0, 128))
    guest.tell(g.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, *addresses, 0))
    assert not guest.acknowledged(g.SET_VRING_KICK, struct.pack("<Q", 0), [guest.receive.kick])
    assert guest.start_ring(guest.receive) and guest.start_ring(guest.transmit)
    guest.offer_buffers()
    assert works(process, guest)
    guest.close()


def test_a_memory_region_longer_than_its_file_is_refused(process):
    guest = Guest(process.vhost_path, 42)
    guest.negotiate()
    table = struct.pack("<IIQQQQ", 1, 0, GUEST_BASE, 1 << 40, USER_BASE, 0)
    assert not guest.acknowledged(g.SET_MEM_TABLE, table, [guest.memory.fd])
    assert not guest.acknowledged(g.SET_MEM_TABLE, guest.memory.table(), [])
    guest.close()


def test_memory_in_slots_and_a_change_of_the_map_under_a_running_guest(process):
    guest = Guest(process.vhost_path, 42)
    guest.negotiate()
    assert guest.protocol_offered & 1 << 15
    assert struct.unpack("<Q", guest.ask(g.GET_MAX_MEM_SLOTS))[0] >= 32
    slot = bytes(8) + guest.memory.table()[8:]
    assert guest.acknowledged(g.ADD_MEM_REG, slot, [guest.memory.fd])
    assert guest.start_ring(guest.receive) and guest.start_ring(guest.transmit)
    guest.offer_buffers()
    sock, key = connect(process, guest)
    extra = g.Memory(1 << 20)
    other = struct.pack("<QQQQQ", 0, 1 << 40, extra.size, USER_BASE << 1, g.FILE_OFFSET)
    assert guest.acknowledged(g.ADD_MEM_REG, other, [extra.fd])
    sock.sendall(b"before")
    assert guest.read(key, 6) == b"before"
    assert guest.acknowledged(g.REM_MEM_REG, other)
    assert not guest.acknowledged(g.REM_MEM_REG, other)
    sock.sendall(b"after")
    assert guest.read(key, 5) == b"after"
    # The memory of the rings goes away: they break, and nobody is hurt.
    assert guest.acknowledged(g.REM_MEM_REG, slot)
    assert is_broken(guest, guest.receive)
    assert is_closed(sock)
    sock.close()
    extra.close()
    guest.close()


def test_a_buffer_across_two_regions(process):
    guest = Guest(process.vhost_path, 42)
    guest.negotiate()
    half = g.MEMORY_SIZE // 2
    table = struct.pack("<II", 2, 0)
    for start in (0, half):
        table += struct.pack("<QQQQ", GUEST_BASE + start, half, USER_BASE + 3 * start,
                             g.FILE_OFFSET + start)
    assert guest.acknowledged(g.SET_MEM_TABLE, table, [guest.memory.fd, guest.memory.fd])
    assert guest.start_ring(guest.receive) and guest.start_ring(guest.transmit)
    guest.receive.describe(0, GUEST_BASE + half - 20, g.BUFFER_SIZE, g.WRITE)
    guest.receive.buffer = lambda slot: GUEST_BASE + half - 20
    guest.receive.offer(0)
    with process.dial(1024):
        assert guest.get_op(g.REQUEST, refill=False).guest_port == 1024
    guest.close()


def test_pause_keeps_the_streams(process, guest):
    sock, key = connect(process, guest)
    bases = [guest.stop_ring(ring) for ring in (guest.receive, guest.transmit)]
    sock.sendall(b"while paused")
    assert guest.hears_nothing(0.05)
    for ring, base in zip((guest.receive, guest.transmit), bases, strict=True):
        assert guest.start_ring(ring, base)
    assert guest.read(key, 12) == b"while paused"
    guest.write(key, b"hello again")
    assert exactly(sock, 11) == b"hello again"
    sock.close()


def test_a_reboot_of_the_guest_ends_the_streams_and_begins_anew(process, guest):
    sock, _ = connect(process, guest)
    guest.restart()
    assert is_closed(sock)
    sock.close()
    assert works(process, guest)


def test_disabled_rings_rest(process, guest):
    for index in (0, 1):
        guest.tell(g.SET_VRING_ENABLE, struct.pack("<II", index, 0))
    with process.dial(1024):
        assert guest.hears_nothing(0.05)
        for index in (0, 1):
            guest.tell(g.SET_VRING_ENABLE, struct.pack("<II", index, 1))
        assert guest.get_op(g.REQUEST).guest_port == 1024


def test_a_frontend_that_reconnects_is_served(tmp_path):
    process = Process(str(tmp_path), linger_s=10)
    for _ in range(3):
        guest = Guest(process.vhost_path, 42)
        guest.boot()
        sock, _ = connect(process, guest)
        fds = process.open_fds()
        guest.close()
        assert is_closed(sock)
        sock.close()
    guest = Guest(process.vhost_path, 42)
    guest.boot()
    sock, _ = connect(process, guest)
    assert process.open_fds() == fds            # nothing is left of the earlier ones
    second = Guest(process.vhost_path, 42)
    assert is_closed(second.sock)               # while the first one is there
    second.close()
    sock.close()
    guest.close()
    process.close()


@pytest.mark.parametrize("garbage", [struct.pack("<III", 1, 1, 1 << 31), struct.pack("<III", 1, 2, 0)])
def test_a_frontend_that_talks_nonsense_is_dropped(process, garbage):
    guest = Guest(process.vhost_path, 42)
    guest.sock.sendall(garbage)
    assert is_closed(guest.sock)
    guest.close()


# -- its beginning and end ------------------------------------------------------------------------
def test_it_ends_when_the_frontend_is_gone_for_good(process):
    guest = Guest(process.vhost_path, 42)
    guest.boot()
    guest.close()
    assert process.wait() == 0
    assert os.listdir(os.path.dirname(process.vhost_path)) == ["log"]


def test_it_ends_with_its_parent(process):
    process.process.stdin.close()               # as the kernel does when the parent dies
    assert process.wait() == 0
    assert os.listdir(os.path.dirname(process.vhost_path)) == ["log"]


def test_sigterm_in_the_middle_of_a_stream(process, guest):
    sock, _ = connect(process, guest)
    process.close()
    assert is_closed(sock)
    sock.close()
    assert os.listdir(os.path.dirname(process.vhost_path)) == ["log"]


def test_it_can_be_run_alone_and_says_what_is_wrong(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-IS", MAIN, *arguments], capture_output=True, text=True,
                              timeout=10, check=False)
    assert "--guest-cid" in run().stderr
    assert "--frob" in run("--frob", "1").stderr
    taken = tmp_path / "taken"
    taken.write_text("")
    failed = run("--guest-cid=3", f"--socket={taken}", f"--uds-path={tmp_path}/u")
    assert failed.returncode == 1 and "in use" in failed.stderr
    assert taken.exists()                       # not ours, not removed


def test_it_is_small(process, guest):
    sock, _ = connect(process, guest)
    assert process.memory_kib("RssAnon") < 9_000
    sock.close()


# -- bad guests -----------------------------------------------------------------------------------
def send_chain(guest, *descriptors, head=0):
    """Lay out descriptors ``(address, length, flags, next)`` from slot 0 on and transmit the chain."""
    for slot, descriptor in enumerate(descriptors):
        guest.transmit.describe(slot, *descriptor)
    guest.transmit.offer(head)
    os.eventfd_write(guest.transmit.kick, 1)


BUFFER = GUEST_BASE + (6 << 20)

BAD_CHAINS = {
    "loop": [(BUFFER, 44, g.NEXT, 1), (BUFFER, 44, g.NEXT, 0)],
    "self loop": [(BUFFER, 44, g.NEXT, 0)],
    "next outside the table": [(BUFFER, 44, g.NEXT, 128)],
    "below the memory": [(GUEST_BASE - 1, 44, 0, 0)],
    "above the memory": [(GUEST_BASE + g.MEMORY_SIZE - 43, 44, 0, 0)],
    "address zero": [(0, 44, 0, 0)],
    "address wraps": [((1 << 64) - 4, 44, 0, 0)],
    "4 GiB long": [(BUFFER, 0xffffffff, 0, 0)],
    "writable": [(BUFFER, 44, g.WRITE, 0)],
    "indirect, empty": [(BUFFER, 0, g.INDIRECT, 0)],
    "indirect, odd length": [(BUFFER, 17, g.INDIRECT, 0)],
    "indirect, silly length": [(BUFFER, 1 << 20, g.INDIRECT, 0)],
    "indirect, outside": [(0x1000, 32, g.INDIRECT, 0)],
    "indirect and next": [(BUFFER, 32, g.INDIRECT | g.NEXT, 1), (BUFFER, 44, 0, 0)],
}


@pytest.mark.parametrize("chain", BAD_CHAINS.values(), ids=BAD_CHAINS)
def test_a_malformed_chain_shuts_the_ring_until_a_reboot(process, guest, chain):
    sock, _ = connect(process, guest)
    guest.memory.put(BUFFER, bytes(64))
    send_chain(guest, *chain)
    assert is_broken(guest, guest.transmit)
    assert is_closed(sock)
    sock.close()
    assert "the ring is shut" in process.log()
    guest.restart()
    assert works(process, guest)


def test_indirect_tables_that_loop_or_nest(process, guest):
    for table in (struct.pack("<QIHH", BUFFER, 44, g.NEXT, 0),
                  struct.pack("<QIHH", BUFFER + 64, 16, g.INDIRECT, 0)):
        guest.memory.put(BUFFER, table)
        guest.memory.put(BUFFER + 64, struct.pack("<QIHH", BUFFER, 44, 0, 0))
        send_chain(guest, (BUFFER, 16, g.INDIRECT, 0))
        assert is_broken(guest, guest.transmit)
        guest.restart()
    assert works(process, guest)


def test_a_good_packet_behind_an_indirect_table_in_many_pieces(process, guest):
    sock, key = connect(process, guest)
    header = g.HEADER.pack(42, 2, key[1], key[0], 3, 1, g.RW, 0, 1 << 18, 0)
    message = header + b"abc"
    guest.memory.put(BUFFER + 4096, message)
    pieces = [(0, 10), (10, 30), (40, 5), (45, 0), (45, 2)]
    table = b"".join(struct.pack("<QIHH", BUFFER + 4096 + start, length,
                                 g.NEXT if number < len(pieces) - 1 else 0, number + 1)
                     for number, (start, length) in enumerate(pieces))
    guest.memory.put(BUFFER, table)
    send_chain(guest, (BUFFER, len(table), g.INDIRECT, 0))
    assert exactly(sock, 3) == b"abc"
    sock.close()


def test_an_available_index_that_jumps(process, guest):
    guest.memory.put(guest.transmit.available + 2, struct.pack("<H", 5000))
    os.eventfd_write(guest.transmit.kick, 1)
    assert is_broken(guest, guest.transmit)


def test_a_head_outside_the_table(process, guest):
    guest.transmit.offer(128)
    os.eventfd_write(guest.transmit.kick, 1)
    assert is_broken(guest, guest.transmit)


@pytest.mark.parametrize("length", [0, 43])
def test_a_receive_buffer_without_room_for_a_header(process, length):
    guest = Guest(process.vhost_path, 42)
    guest.negotiate()
    guest.share_memory()
    assert guest.start_ring(guest.receive) and guest.start_ring(guest.transmit)
    guest.receive.describe(0, guest.receive.buffer(0), length, g.WRITE)
    guest.receive.offer(0)
    with process.dial(1024) as sock:
        assert is_broken(guest, guest.receive)
        assert is_closed(sock)
    guest.close()


@pytest.mark.parametrize("bad", [
    {"kind": 2}, {"kind": 0}, {"length": 5000}, {"length": 0xffffffff}])
def test_a_bad_header_resets_its_stream_only(process, guest, bad):
    sock, key = connect(process, guest)
    other, other_key = connect(process, guest, 1025)
    guest.send(g.RW, *key, b"data", **bad)
    assert guest.get_op(g.RST).host_port == key[0]
    assert is_closed(sock)
    guest.write(other_key, b"fine")
    assert exactly(other, 4) == b"fine"
    sock.close()
    other.close()


@pytest.mark.parametrize("bad", [{"source": 3}, {"target": 1}, {"target": 1 << 40}])
def test_a_packet_of_a_stranger_is_dropped(process, guest, bad):
    sock, key = connect(process, guest)
    guest.send(g.RW, *key, b"wrong", **bad)
    guest.send(g.RW, *key, b"right")
    assert exactly(sock, 5) == b"right"
    sock.close()


@pytest.mark.parametrize("op", [0, g.REQUEST, g.RESPONSE, 8, 0xffff])
def test_an_operation_out_of_place_resets_the_stream(process, guest, op):
    sock, key = connect(process, guest)
    guest.send(op, *key)
    assert guest.get_op(g.RST).host_port == key[0]
    assert is_closed(sock)
    sock.close()
    assert works(process, guest)


def test_data_beyond_the_credit_resets_the_stream(process, guest):
    sock, key = connect(process, guest)
    for _ in range(2000):                       # the host program reads nothing
        guest.send(g.RW, *key, bytes(4096))
        guest.poll()
        if any(packet.op == g.RST for packet in guest.inbox):
            break
    assert guest.get_op(g.RST).host_port == key[0]
    assert process.memory_kib("RssAnon") < 12_000
    sock.close()


def test_data_after_the_end_resets_the_stream(process, guest):
    sock, key = connect(process, guest)
    guest.send(g.SHUTDOWN, *key, flags=2)
    guest.send(g.RW, *key, b"more")
    assert guest.get_op(g.RST).host_port == key[0]
    sock.close()


def test_credit_that_runs_ahead_or_backwards_gives_nothing(process, guest):
    guest.buffer_size = 1000
    sock, key = connect(process, guest)
    with sock:
        sock.sendall(b"x" * 5000)
        assert guest.get_op(g.RW).data == b"x" * 1000
        guest.send(g.CREDIT_UPDATE, *key, consumed=0x7fffffff)
        guest.send(g.CREDIT_UPDATE, *key, consumed=1001)
        assert guest.hears_nothing(0.1)
        guest.send(g.CREDIT_UPDATE, *key, consumed=600)
        assert len(guest.get_op(g.RW).data) == 600
        guest.send(g.CREDIT_UPDATE, *key, consumed=200)     # stale
        assert guest.hears_nothing(0.1)


def test_a_flood_of_tiny_packets_stays_small(process, guest):
    sock, key = connect(process, guest)
    for _ in range(20_000):
        guest.send(g.RW, *key, b"x", kick=len(guest.free_slots) < 16)
    os.eventfd_write(guest.transmit.kick, 1)
    assert exactly(sock, 20_000) == b"x" * 20_000
    assert process.memory_kib("RssAnon") < 12_000
    sock.close()


def test_a_guest_that_asks_but_never_listens_is_held_back(process):
    guest = Guest(process.vhost_path, 42)
    guest.negotiate()
    guest.share_memory()
    assert guest.start_ring(guest.receive) and guest.start_ring(guest.transmit)
    before = process.memory_kib("RssAnon")
    taken = 0
    slots = len(guest.free_slots)
    for round_ in range(10):
        for slot in range(slots):
            guest.transmit.describe(slot, BUFFER, 44)
            guest.memory.put(BUFFER, g.HEADER.pack(42, 2, slot, round_, 0, 1, g.RW, 0, 0, 0))
            guest.transmit.offer(slot)
        os.eventfd_write(guest.transmit.kick, 1)
        guest.hears_nothing(0.02)
        while guest.transmit.take() is not None:
            taken += 1
        if guest.transmit.offered != guest.transmit.seen:
            break
    assert taken == 256
    assert process.memory_kib("RssAnon") - before < 1000
    guest.offer_buffers()
    for _ in range(taken):
        guest.get_op(g.RST)
    guest.close()


def test_the_log_cannot_be_flooded(process, guest):
    for port in range(500):
        guest.send(g.REQUEST, 1, port)
        guest.get_op(g.RST)
    assert len(process.log().splitlines()) <= 20


def test_random_bytes_over_both_rings_and_all_buffers(process, guest):
    """Long nonsense at random places: the process lives, answers the frontend, and touches no guard."""
    chance = random.Random(7)
    sock, _ = connect(process, guest)
    sock.close()
    for _ in range(60):
        guest.restart()
        for ring in (guest.receive, guest.transmit):
            area = ring.used + 6 + 8 * ring.size - ring.descriptors
            for _ in range(chance.choice((1, 10, 100))):
                at = chance.randrange(area)
                guest.memory.put(ring.descriptors + at, chance.randbytes(min(area - at, 24)))
        dialled = process.dial(1024)
        for ring in (guest.transmit, guest.receive):
            os.eventfd_write(ring.kick, 1)
        guest.ask(g.GET_FEATURES)
        dialled.close()
    assert process.running()
    guest.restart()
    assert works(process, guest)


def test_few_fds_are_enough_to_survive(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        process = Process(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    guest = Guest(process.vhost_path, 42)
    guest.boot()
    assert works(process, guest)
    guest.close()
    process.close()
