"""A pod's network namespace as a CNI plugin leaves it, and a world outside that can reach it.

Both are namespaces of the test's own, so nothing of the machine's network is touched.
"""

import itertools
import os
import select
import socket
import struct
import subprocess
import threading
import time

from katashim import undo
from katashim.resources import netlink, netns
from katashim.resources.releases import RELEASES

_numbers = itertools.count()
_VNET_HEADER = bytes(10)
_DEADLINE_S = 5


def stack(journal=None):
    """An undo stack, with its journal at the path `journal`."""
    return undo.Undo(None if journal is None else str(journal), RELEASES)


class Namespace:
    """A network namespace under /run/netns for the time of a ``with`` block."""

    def __init__(self, role):
        self.name = f"katashim-test-{os.getpid()}-{next(_numbers)}-{role}"
        self.path = f"/run/netns/{self.name}"

    def __enter__(self):
        netns.create(self.path)
        self.ip("link set lo up")
        return self

    def __exit__(self, *error):
        netns.remove(self.path)

    def ip(self, command):
        """Run ip(8) in it."""
        return _run(["ip", "-n", self.name, *command.split()])

    def run(self, command):
        """Run another program in it; returns what it printed."""
        return _run(["ip", "netns", "exec", self.name, *command.split()])

    def picture(self):
        """All links and qdiscs, to compare before and after."""
        with netlink.Rtnetlink(self.path) as kernel:
            return sorted(link.name for link in kernel.links()), sorted(kernel.qdiscs())


class Pod(Namespace):
    """The pod's namespace, and :attr:`outside`, joined by eth0 (10.88.0.2) - out0 (10.88.0.1)."""

    def __init__(self):
        super().__init__("pod")
        self.outside = Namespace("out")

    def __enter__(self):
        super().__enter__()
        self.outside.__enter__()
        self.add_veth("eth0", "out0")
        self.ip("addr add 10.88.0.2/24 dev eth0")
        self.outside.ip("addr add 10.88.0.1/24 dev out0")
        return self

    def __exit__(self, *error):
        self.outside.__exit__()
        super().__exit__()

    def add_veth(self, name, outside_name):
        """Join the two once more; both ends up."""
        fd = os.open(self.outside.path, os.O_RDONLY)
        try:
            with netlink.Rtnetlink(self.path) as kernel:
                kernel.add_veth(name, outside_name, fd)
                kernel.set_link(name, up=True)
        finally:
            os.close(fd)
        self.outside.ip(f"link set {outside_name} up")

    def link(self, name):
        with netlink.Rtnetlink(self.path) as kernel:
            return kernel.link(name)

    def redirects(self, name):
        with netlink.Rtnetlink(self.path) as kernel:
            link = kernel.link(name)
            return [redirect.target for redirect in kernel.redirects(link)]


class Guest:
    """A guest behind a tap, just big enough to answer ARP and ping, and to ping itself.

    :param nic: the Nic with the tap's descriptor. :param address: its IPv4 address.
    """

    def __init__(self, nic, address):
        self._fd = nic.fds[0]
        self._mac = bytes.fromhex(nic.mac.replace(":", ""))
        self._ip = socket.inet_aton(address)

    def __enter__(self):
        """Answer in a thread, for the time of a ``with`` block."""
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *error):
        os.close(self._stopped)
        self._thread.join()
        os.close(self._stop)

    def ping(self, address):
        """Resolve and ping an address outside; returns the payload that came back. Not while it serves."""
        target = socket.inet_aton(address)
        self._send(b"\xff" * 6, 0x0806, struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, self._mac, self._ip,
                                                    bytes(6), target))
        answer = self._receive(lambda kind, body: kind == 0x0806 and body[6:8] == b"\0\2" and body[14:18] == target)
        message = _checksummed(8, 0, b"\x12\x34\0\1" + b"from the guest")
        self._send(answer[8:14], 0x0800, _ip_packet(self._ip, target, message))
        reply = self._receive(lambda kind, body: kind == 0x0800 and body[9] == 1 and body[20] == 0)
        return reply[28:]

    def _serve(self):
        poller = select.poll()
        for fd in (self._fd, self._stop):
            poller.register(fd, select.POLLIN)
        while not any(fd == self._stop for fd, _ in poller.poll()):
            kind, source, body = self._frame()
            if kind == 0x0806 and body[6:8] == b"\0\1" and body[24:28] == self._ip:
                self._send(source, 0x0806, struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 2, self._mac, self._ip,
                                                       source, body[14:18]))
            elif kind == 0x0800 and body[9] == 1 and body[20] == 8 and body[16:20] == self._ip:
                self._send(source, 0x0800, _ip_packet(self._ip, body[12:16], _checksummed(0, 0, body[24:])))

    def _receive(self, wanted):
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        end = time.monotonic() + _DEADLINE_S
        while poller.poll(max(0, end - time.monotonic()) * 1000):
            kind, _, body = self._frame()
            if wanted(kind, body):
                return body
        raise AssertionError(f"the guest got no answer in {_DEADLINE_S} s")

    def _frame(self):
        frame = os.read(self._fd, 65536)[len(_VNET_HEADER):]
        return int.from_bytes(frame[12:14], "big"), frame[6:12], frame[14:]

    def _send(self, to, kind, body):
        os.write(self._fd, _VNET_HEADER + to + self._mac + kind.to_bytes(2, "big") + body)


def _run(command):
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def _checksummed(kind, code, rest):
    return struct.pack("!BBH", kind, code, _checksum(struct.pack("!BBH", kind, code, 0) + rest)) + rest


def _ip_packet(source, target, body):
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0, 64, 1, 0, source, target)
    return head[:10] + _checksum(head).to_bytes(2, "big") + head[12:] + body


def _checksum(data):
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total
