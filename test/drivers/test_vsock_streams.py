"""The vsock device as a process: streams through it, seen from a guest's driver and the host's sockets."""

import os
import socket
import threading
import zlib

import pytest
import vsock_guest as g
from vsock_guest import Guest
from vsock_process import Process, exactly, is_closed, read_line

BUFFER_SIZE = 256 * 1024


@pytest.fixture
def process(tmp_path):
    process = Process(str(tmp_path))
    yield process
    process.close()


@pytest.fixture(params=[True, False], ids=["event-idx", "flags"])
def any_guest(process, request):
    guest = Guest(process.vhost_path, 42, event_idx=request.param)
    guest.boot()
    yield guest
    guest.close()


@pytest.fixture
def guest(process):
    guest = Guest(process.vhost_path, 42)
    guest.boot()
    yield guest
    guest.close()


def connect(process, guest, port=1024):
    """A stream opened from the host: ``(socket, key)``."""
    sock = process.dial(port)
    key = guest.accept()
    assert key[1] == port
    assert read_line(sock) == b"OK %d\n" % key[0]
    return sock, key


def connect_from_guest(process, guest, port, guest_port=5000):
    """A stream opened from the guest: ``(socket, key)``."""
    with process.listen(port) as listener:
        guest.send(g.REQUEST, port, guest_port)
        sock, _ = listener.accept()
    sock.settimeout(10)
    assert guest.get_op(g.RESPONSE).buffer_size == BUFFER_SIZE
    return sock, (port, guest_port)


def test_host_connects_and_bytes_pass_both_ways(process, any_guest):
    sock, key = connect(process, any_guest)
    with sock:
        sock.sendall(b"ping")
        assert any_guest.read(key, 4) == b"ping"
        any_guest.write(key, b"pong")
        assert exactly(sock, 4) == b"pong"


@pytest.mark.parametrize("line", [b"connect 7\n", b"CONNECT 7\n", b"Connect  7 \r\n"])
def test_the_verb_may_be_in_either_case(process, guest, line):
    with process.dial(7, line) as sock:
        key = guest.accept()
        assert key[1] == 7
        assert read_line(sock) == b"OK %d\n" % key[0]


@pytest.mark.parametrize("line", [b"HELLO 7\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT -1\n",
                                  b"CONNECT 4294967296\n", b"CONNECT 1 2\n", b"\xff" * 200, b"\n"])
def test_a_bad_greeting_ends_the_connection(process, guest, line):
    with process.dial(7, line) as sock:
        assert is_closed(sock)


def test_a_greeting_in_pieces_and_bytes_right_behind_it(process, guest):
    with process.dial(7, b"CON") as sock:
        sock.sendall(b"NECT 7")
        sock.sendall(b"\nearly")
        key = guest.accept()
        assert guest.read(key, 5) == b"early"


def test_half_a_greeting_does_not_spin(process, guest):
    with process.dial(7, b"CONNECT 7"):
        before = process.cpu_ticks()
        assert guest.hears_nothing(0.15)
        assert process.cpu_ticks() - before <= 5


def test_a_refused_port_closes_the_host_socket(process, guest):
    with process.dial(9) as sock:
        request = guest.get_op(g.REQUEST)
        guest.send(g.RST, request.host_port, 9)
        assert is_closed(sock)


def test_guest_connects_to_a_host_program(process, any_guest):
    sock, key = connect_from_guest(process, any_guest, 10240)
    with sock:
        any_guest.write(key, b"spans")
        assert exactly(sock, 5) == b"spans"
        sock.sendall(b"thanks")
        assert any_guest.read(key, 6) == b"thanks"


def test_guest_connects_where_nobody_listens(process, guest):
    guest.send(g.REQUEST, 1, 5000)
    packet = guest.get_op(g.RST)
    assert (packet.host_port, packet.guest_port) == (1, 5000)


def test_a_host_program_with_a_full_backlog_is_a_refusal_not_a_hang(process, guest):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(process.uds_path + "_77")
    listener.listen(0)
    with listener:
        for port in range(5):
            guest.send(g.REQUEST, 77, 6000 + port)
        answers = [guest.get().op for _ in range(5)]
    assert g.RST in answers and g.RESPONSE in answers


def test_several_streams_at_once_do_not_mix(process, guest):
    streams = [connect(process, guest, port) for port in (1024, 1024, 1025, 1026)]
    assert len({key for _, key in streams}) == 4
    for number, (sock, key) in enumerate(streams):
        sock.sendall(b"%d" % number * 1000)
        guest.write(key, b"%d" % (number + 5) * 1000)
    for number, (sock, key) in enumerate(streams):
        with sock:
            assert guest.read_of(key, 1000) == b"%d" % number * 1000
            assert exactly(sock, 1000) == b"%d" % (number + 5) * 1000


def test_64_mib_each_way_at_the_same_time(process, guest):
    sock, key = connect(process, guest)
    total = 64 << 20
    block = bytes(range(256)) * 4096
    crc = {}

    def host_writes():
        for _ in range(total // len(block)):
            sock.sendall(block)

    def host_reads():
        crc["host"] = zlib.crc32(exactly(sock, total))

    threads = [threading.Thread(target=host_writes), threading.Thread(target=host_reads)]
    with sock:
        for thread in threads:
            thread.start()
        received = 0
        seen = 0
        announced = 0
        left = memoryview(block * (total // len(block)))
        while left or received < total:
            moved = guest.poll()
            while guest.inbox:
                packet = guest.inbox.pop(0)
                seen = zlib.crc32(packet.data, seen)
                received += len(packet.data)
            guest.consumed[key] = received
            if received - announced >= BUFFER_SIZE // 4:
                guest.send(g.CREDIT_UPDATE, *key)
                announced = received
            room = min(guest.credit(key), 4096, len(left))
            if room > 0:
                guest.send(g.RW, *key, bytes(left[:room]))
                left = left[room:]
            elif not moved:
                guest.wait_for_the_device()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    expected = zlib.crc32(block * (total // len(block)))
    assert seen == expected and crc["host"] == expected


def test_the_guest_half_closes(process, guest):
    sock, key = connect(process, guest)
    with sock:
        guest.write(key, b"last words")
        guest.send(g.SHUTDOWN, *key, flags=2)
        assert exactly(sock, 10) == b"last words"
        assert is_closed(sock)                      # its direction only
        sock.sendall(b"still here")
        assert guest.read(key, 10) == b"still here"
        sock.shutdown(socket.SHUT_WR)
        assert guest.get_op(g.SHUTDOWN).flags == 3


def test_the_host_half_closes(process, guest):
    sock, key = connect(process, guest)
    with sock:
        sock.sendall(b"question")
        sock.shutdown(socket.SHUT_WR)
        assert guest.read(key, 8) == b"question"
        assert guest.get_op(g.SHUTDOWN).flags == 2
        guest.write(key, b"answer")
        assert exactly(sock, 6) == b"answer"
        guest.send(g.SHUTDOWN, *key, flags=3)
        assert guest.get_op(g.RST).host_port == key[0]
        assert is_closed(sock)


def test_the_host_closes_and_the_guest_confirms(process, guest):
    sock, key = connect(process, guest)
    fds = process.open_fds()
    sock.sendall(b"bye")
    sock.close()
    assert guest.read(key, 3) == b"bye"
    assert guest.get_op(g.SHUTDOWN).flags == 3
    guest.send(g.RST, *key)
    guest.send(g.RW, *key, b"?")                    # unknown by now
    assert guest.get_op(g.RST).host_port == key[0]
    assert process.open_fds() == fds - 1


def test_the_host_closes_and_the_guest_never_confirms(process, guest):
    sock, key = connect(process, guest)
    sock.close()
    assert guest.get_op(g.SHUTDOWN).flags == 3
    assert guest.get_op(g.RST).host_port == key[0]  # after a second


def test_the_host_closes_after_half_closing_while_the_guest_talks(process, guest):
    sock, key = connect(process, guest)
    sock.shutdown(socket.SHUT_WR)
    guest.get_op(g.SHUTDOWN)
    sock.close()
    assert guest.get_op(g.RST).host_port == key[0]


def test_the_guest_closes_with_data_under_way(process, guest):
    sock, key = connect(process, guest)
    data = os.urandom(BUFFER_SIZE)
    with sock:
        guest.write(key, data)
        guest.send(g.SHUTDOWN, *key, flags=3)
        guest.get_op(g.RST)
        assert exactly(sock, len(data)) == data     # read only now
        assert is_closed(sock)


def test_a_dialler_that_gives_up_is_forgotten(process, guest):
    sock = process.dial(1024)
    request = guest.get_op(g.REQUEST)
    sock.close()
    assert guest.get_op(g.RST).host_port == request.host_port
    guest.send(g.RESPONSE, request.host_port, 1024)     # crossed it on its way
    assert guest.get_op(g.RST).host_port == request.host_port


def test_a_guest_without_buffers_gets_everything_when_it_has_some(process):
    guest = Guest(process.vhost_path, 42)
    guest.negotiate()
    guest.share_memory()
    assert guest.start_ring(guest.receive) and guest.start_ring(guest.transmit)
    sock = process.dial(1024)
    guest.offer_buffers(1)
    request = guest.get_op(g.REQUEST, refill=False)
    key = request.host_port, request.guest_port
    guest.send(g.RESPONSE, *key)
    with sock:
        read_line(sock)
        data = os.urandom(100_000)
        sock.sendall(data)
        before = process.cpu_ticks()
        assert guest.hears_nothing(0.15)
        assert process.cpu_ticks() - before <= 5        # waits, does not spin
        guest.receive.offered = guest.receive.seen      # the one slot was used
        guest.offer_buffers()
        assert guest.read(key, len(data)) == data
    guest.close()


def test_a_host_program_that_does_not_read_holds_the_guest_back(process, guest):
    sock, key = connect(process, guest)
    with sock:
        data = os.urandom(4 * BUFFER_SIZE)
        written = 0
        while guest.credit(key) > 0:
            room = min(guest.credit(key), 4096)
            guest.send(g.RW, *key, data[written:written + room])
            written += room
            guest.poll()
        guest.send(g.CREDIT_REQUEST, *key)
        guest.get_op(g.CREDIT_UPDATE)
        assert written < 3 * BUFFER_SIZE                # its buffer and the socket's
        assert process.memory_kib() < 40_000
        rest = threading.Thread(target=guest.write, args=(key, data[written:]))
        rest.start()
        assert exactly(sock, len(data)) == data
        rest.join(10)
        assert not rest.is_alive()


def test_a_guest_without_credit_holds_the_host_back(process, guest):
    guest.buffer_size = 10_000
    sock, key = connect(process, guest)
    with sock:
        sock.sendall(b"x" * 30_000)
        got = 0
        while got < 10_000:
            got += len(guest.get_op(g.RW).data)
        assert got == 10_000
        before = process.cpu_ticks()
        assert guest.hears_nothing(0.15)
        assert process.cpu_ticks() - before <= 5
        sock.close()                                    # EPOLLHUP for ever; still no spinning
        assert guest.hears_nothing(0.15)
        assert process.cpu_ticks() - before <= 5
        while got < 30_000:
            guest.consumed[key] = got
            guest.send(g.CREDIT_UPDATE, *key)
            got += len(guest.get_op(g.RW).data)
        guest.consumed[key] = got
        guest.send(g.CREDIT_UPDATE, *key)
        assert guest.get_op(g.SHUTDOWN).flags == 3


def test_more_connections_than_allowed_are_refused(process, guest):
    socks = []
    for _ in range(512):
        socks.append(process.dial(1024))
        guest.get_op(g.REQUEST)
    with process.dial(1024) as sock:
        assert is_closed(sock)
    for sock in socks:
        sock.close()
    for _ in socks:
        guest.get_op(g.RST)
    sock, _ = connect(process, guest)
    sock.close()
