"""The vsock device alone: round trips and throughput, with a guest's driver in this process.

Half of each figure is the driver's (test/drivers/vsock_guest.py), so compare only with other runs. With
Linux as the guest under TCG a round trip takes some 130 us, throughput is 300 to 400 MB/s each way.
"""

import os
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.join(os.path.dirname(HERE), "drivers")]

import vsock_guest as g
from vsock_process import Process, exactly, read_line

ROUND_TRIPS = 5000
BYTES = 128 << 20


def round_trips(guest, sock, key):
    """Sorted seconds of 64 bytes there and back."""
    taken = []
    for _ in range(ROUND_TRIPS):
        began = time.perf_counter()
        sock.sendall(bytes(64))
        guest.read_of(key, 64)
        guest.send(g.RW, *key, bytes(64), consumed=guest.sent[key] + 64)
        exactly(sock, 64)
        taken.append(time.perf_counter() - began)
    return sorted(taken)


def megabytes_per_second(work, other):
    """Run `other` in a thread beside `work`."""
    thread = threading.Thread(target=other)
    began = time.perf_counter()
    thread.start()
    work()
    thread.join()
    return BYTES / 1e6 / (time.perf_counter() - began)


def main():
    with tempfile.TemporaryDirectory() as directory:
        process = Process(directory)
        guest = g.Guest(process.vhost_path, 42)
        guest.boot()
        sock = process.dial(1024)
        key = guest.accept()
        read_line(sock)
        taken = round_trips(guest, sock, key)
        print(f"round trip of 64 bytes: median {taken[len(taken) // 2] * 1e6:.0f} us, "
              f"95 % below {taken[len(taken) * 95 // 100] * 1e6:.0f} us")
        guest.consumed[key] = ROUND_TRIPS * 64
        block = bytes(BYTES)
        rate = megabytes_per_second(lambda: guest.read(key, BYTES), lambda: sock.sendall(block))
        print(f"host to guest: {rate:.0f} MB/s")
        rate = megabytes_per_second(lambda: guest.write(key, block), lambda: exactly(sock, BYTES))
        print(f"guest to host: {rate:.0f} MB/s")
        print(f"memory of its own: {process.memory_kib('RssAnon')} KiB")
        sock.close()
        guest.close()
        process.close()


if __name__ == "__main__":
    main()
