"""What goes through a process's stdio, and when it ends."""

import threading
import time
import zlib

import pytest
from plain_client import Refused


def test_eight_megabytes_and_exit_arrive_whole(pod):
    cid = pod.run("sh", "-c", "head -c 8388608 /dev/zero; echo end >&2; exit 4")
    assert len(pod.read(cid, size=1 << 20)) == 8 << 20
    assert pod.read(cid, stream="Stderr") == b"end\n"
    assert pod.wait(cid) == 4


def test_what_was_written_before_the_end_is_read_after_it(pod, client):
    cid = pod.run("sleep", "1000")
    exec_id = pod.execute(cid, "sh", "-c", "echo $$; echo last words")
    pid = client.call("ReadStdout", container_id=cid, exec_id=exec_id, len=2).data.split()[0].decode()
    while f"\n{pid} " in pod.output(cid, "sh", "-c", "busybox ps -o pid,comm | busybox sed 's/^ *//'"):
        pass        # bounded by the test's deadline: the process is ending
    assert pod.read(cid, exec_id) == b"last words\n"
    assert pod.wait(cid, exec_id) == 0


def test_twenty_megabytes_in_and_out(pod, client):
    cid = pod.run("cat")
    block = bytes(range(256)) * 4096        # 1 MiB
    sent, received = 0, []
    reader = threading.Thread(target=lambda: received.append(pod.read(cid, size=1 << 20)))
    reader.start()
    for index in range(20):
        data = bytes([index]) + block[1:]
        assert client.call("WriteStdin", container_id=cid, data=data).len == len(data)
        sent = zlib.crc32(data, sent)
    client.call("CloseStdin", container_id=cid)
    reader.join(30)
    assert len(received[0]) == 20 << 20
    assert zlib.crc32(received[0]) == sent
    assert pod.wait(cid) == 0


def test_empty_input_ends_the_input(pod, client):
    cid = pod.run("cat")
    client.call("WriteStdin", container_id=cid, data=b"x")
    assert client.call("WriteStdin", container_id=cid, data=b"").len == 0
    assert pod.read(cid) == b"x"
    assert pod.wait(cid) == 0


def test_writing_to_a_process_that_does_not_read_any_more_is_an_error(pod, client):
    cid = pod.run("sh", "-c", "exec 0<&-; echo closed; sleep 100")
    assert client.call("ReadStdout", container_id=cid, len=10).data == b"closed\n"
    with pytest.raises(Refused, match=r"13: Broken pipe \(os error 32\)"):
        client.call("WriteStdin", container_id=cid, data=b"x")


def test_writing_to_one_that_never_reads_ends_with_it(pod, client):
    cid = pod.run("sleep", "1000")
    failures = []

    def write():
        try:
            client.call("WriteStdin", container_id=cid, data=bytes(1 << 20))
        except Refused as exc:
            failures.append(exc.code)

    writer = threading.Thread(target=write)
    writer.start()
    client.call("SignalProcess", container_id=cid, signal=9)
    writer.join(10)
    assert failures == [13]


def test_writing_after_the_input_was_closed_is_an_error(pod, client):
    cid = pod.run("cat")
    client.call("CloseStdin", container_id=cid)
    with pytest.raises(Refused, match="^13: "):
        client.call("WriteStdin", container_id=cid, data=b"x")


def test_a_grandchild_that_keeps_the_pipe_holds_nothing_up(pod):
    cid = pod.run("sleep", "1000")
    exec_id = pod.execute(cid, "sh", "-c", "sleep 500 & echo parent is done")
    start = time.monotonic()
    assert pod.read(cid, exec_id) == b"parent is done\n"
    assert pod.wait(cid, exec_id) == 0
    assert 0.4 < time.monotonic() - start < 5       # 500 ms of silence are waited for


def test_a_read_returns_no_more_than_asked_for(pod, client):
    cid = pod.run("sh", "-c", "echo 0123456789")
    assert client.call("ReadStdout", container_id=cid, len=4).data == b"0123"
    assert pod.read(cid) == b"456789\n"


def test_a_read_that_waits_holds_no_other_call_up(pod, client):
    cid = pod.run("sleep", "1000")
    threads = [threading.Thread(target=lambda: pod.read(cid), daemon=True) for _ in range(40)]
    for thread in threads:
        thread.start()
    assert pod.output(cid, "echo", "still here") == "still here\n"
    client.call("SignalProcess", container_id=cid, signal=9)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_terminal(pod, client):
    cid = pod.run("sh", "-c", "tty; stty size; read line; stty size; echo got $line; exit 6", Terminal=True,
                  ConsoleSize={"Height": 33, "Width": 44})
    assert _until(client, cid, b"\n", 2).split() == [b"/dev/pts/0", b"33", b"44"]
    client.call("TtyWinResize", container_id=cid, row=10, column=20)
    client.call("WriteStdin", container_id=cid, data=b"text\n")
    text = b""
    with pytest.raises(Refused, match=r"13: Input/output error \(os error 5\)"):
        while True:
            text += client.call("ReadStdout", container_id=cid, len=100).data
    assert text == b"text\r\n10 20\r\ngot text\r\n"
    assert pod.wait(cid) == 6


def test_closing_the_input_of_a_terminal_does_not_hang_up(pod, client):
    cid = pod.run("sh", "-c", "read line; echo got $line", Terminal=True)
    client.call("CloseStdin", container_id=cid)
    client.call("WriteStdin", container_id=cid, data=b"text\n")
    assert _until(client, cid, b"\n", 2) == b"text\r\ngot text\r\n"


def test_a_size_for_what_is_no_terminal(pod, client):
    cid = pod.run("sleep", "100")
    with pytest.raises(Refused, match='^14: "no tty"'):
        client.call("TtyWinResize", container_id=cid, row=1, column=1)


def _until(client, cid, mark, count):
    text = b""
    while text.count(mark) < count:
        text += client.call("ReadStdout", container_id=cid, len=100).data
    return text
