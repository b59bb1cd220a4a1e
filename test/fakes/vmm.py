"""A fake VMM, as katashim.drivers.fake starts it: a process with a guest in it.

The guest is a pid namespace: its first process dies with the VMM, and all others with it, so nothing of
a VM outlives its VMM here either. Its agent (test/fakes/fake_agent.py) is behind a hybrid vsock: a unix
socket where ``CONNECT 1024`` is answered by ``OK <port>``.

The driver's channel is descriptor `--channel`: it hears ``{"ready": version}`` and says ``quit``. A test
may connect to `--control` and send lines of JSON: ``{"fault": "StartContainer=die"}``, ``{"oom": id}``,
``{"ask": "calls"}``; each is answered by a line. Faults can come by $KATASHIM_FAKE_FAULTS too, and then
there are three more: ``boot=exit:STATUS``, ``boot=silent`` (no agent ever answers), ``boot=mute`` (it
never becomes ready).
"""

import argparse
import ctypes
import json
import os
import signal
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)          # before the directory of this file
# A process whose children get a new pid namespace can have no threads.
os.environ.pop("GEVENT_MONITOR_THREAD_ENABLE", None)

import gevent
from fake_agent import FakeAgent, Faulty
from gevent import socket
from gevent.event import Event

from katashim import child
from katashim.ttrpc.server import Server

AGENT_PORT = 1024
VERSION = "1.0"
_CLONE_NEWPID = 0x20000000
_COPY_BYTES = 64 * 1024


class Vmm:
    """The process."""

    def __init__(self, options):
        self.options = options
        self.over = Event()
        self.channel = socket.socket(fileno=options.channel)
        self.relays = set()
        self.faults = os.environ.get("KATASHIM_FAKE_FAULTS", "")
        self.agent = FakeAgent(end=lambda: gevent.spawn_later(0.01, self.over.set))
        self.faulty = Faulty(self.agent, self.faults, die=die, hang_up=self.hang_up)

    def run(self):
        boot = dict(fault.split("=") for fault in self.faults.split(",") if fault).get("boot", "")
        if boot.startswith("exit:"):
            print("fake: cannot open the kernel image", file=sys.stderr)
            return int(boot.partition(":")[2])
        print("fake kernel: booting", flush=True)
        start_guest()
        self.listen(self.options.control, self.serve_control)
        if boot != "silent":
            self.serve_agent()
            print("kata-agent: listening", flush=True)
        self.listen(self.options.vsock, self.relay)
        gevent.spawn(self.serve_channel)
        if boot != "mute":
            self.channel.sendall(json.dumps({"ready": VERSION}).encode() + b"\n")
        self.over.wait()
        return 0

    def serve_channel(self):
        """What the driver says; when it is gone this goes on, as a real VMM does."""
        for line in self.channel.makefile("rb"):
            if json.loads(line) == "quit":
                self.over.set()

    # -- the hybrid vsock -------------------------------------------------------------------------
    def serve_agent(self):
        self.inner = self.options.vsock + ".agent"
        Server(listener_at(self.inner), {"grpc.AgentService": self.faulty, "grpc.Health": self.faulty},
               name="the host").start()

    def relay(self, outer):
        """One connection of the host: the handshake, then bytes both ways."""
        line = b""
        while not line.endswith(b"\n"):
            byte = outer.recv(1)
            if not byte:
                return outer.close()
            line += byte
        if line != b"CONNECT %d\n" % AGENT_PORT or not hasattr(self, "inner"):
            return outer.close()            # nobody listens on that port of the guest
        inner = socket.socket(socket.AF_UNIX)
        inner.connect(self.inner)
        outer.sendall(b"OK 1073741824\n")
        pair = (outer, inner)
        self.relays.add(pair)
        gevent.joinall([gevent.spawn(copy, outer, inner), gevent.spawn(copy, inner, outer)])
        self.relays.discard(pair)
        for sock in pair:
            sock.close()

    def hang_up(self):
        """Cut all connections of the agent."""
        for pair in list(self.relays):
            for sock in pair:
                sock.shutdown(socket.SHUT_RDWR)

    # -- what tests may do ------------------------------------------------------------------------
    def serve_control(self, sock):
        stream = sock.makefile("rwb")
        for line in stream:
            stream.write(json.dumps(self.control(json.loads(line))).encode() + b"\n")
            stream.flush()
        sock.close()

    def control(self, order):
        if "fault" in order:
            self.faulty.add(order["fault"])
        if "oom" in order:
            self.agent.out_of_memory(order["oom"])
        if "hangup" in order:
            self.hang_up()
        if order.get("ask") == "calls":
            return self.agent.calls
        if order.get("ask") == "containers":
            return sorted(self.agent.containers)
        if order.get("ask") == "resources":
            return str(self.agent.containers[order["id"]].resources)
        return True

    @staticmethod
    def listen(path, handler):
        gevent.spawn(accept, listener_at(path), handler)


def listener_at(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)      # who sees it can connect
    return listener


def accept(listener, handler):
    while True:
        gevent.spawn(handler, listener.accept()[0])


def copy(source, target):
    try:
        while data := source.recv(_COPY_BYTES):
            target.sendall(data)
    except OSError:
        pass                                # the other side is gone, which is an end too
    try:
        target.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def start_guest():
    """The guest's first process, and a pid namespace that lives as long as it does."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWPID) != 0:
        raise OSError(ctypes.get_errno(), "cannot make a pid namespace")
    child.spawn(["setpriv", "--pdeathsig", "KILL", "sleep", "infinity"], name="the guest's first process")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--id", required=True)
    parser.add_argument("--vsock", required=True, help="path of the hybrid vsock")
    parser.add_argument("--control", required=True, help="path of the socket for tests")
    parser.add_argument("--channel", required=True, type=int, help="descriptor of the driver's channel")
    return Vmm(parser.parse_args()).run()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
