"""How fast the shim moves a process's output from the agent into containerd's FIFO.

    .venv/bin/python test/bench/bench_stdio.py [--mib 512] [--min-mb-s 100]

Three processes as in life: a stand-in for the guest's agent (katashim's own ttRPC server on a unix
socket, answering ReadStdout at once), the shim's side (ttRPC client, copy_out), and a client that
reads the FIFO. Prints MB/s; exits 1 below the budget of SPECIFICATION.md.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from katashim import green
from katashim.runtime.stdio import CHUNK_BYTES, copy_out, open_stdio
from katashim.ttrpc import proto
from katashim.ttrpc.client import Client
from katashim.ttrpc.server import Server

AGENT = "grpc.AgentService"
READ = proto.service(AGENT)["ReadStdout"]


class Agent:
    """Answers ReadStdout with as many bytes as are asked for, `total` in all."""

    def __init__(self, total):
        self._left = total
        self._chunk = os.urandom(CHUNK_BYTES)

    def ReadStdout(self, request, context):     # the RPC's name
        size = min(request.len, self._left)
        self._left -= size
        return READ.response(data=self._chunk[:size])


def serve(path, total):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    server = Server(listener, {AGENT: Agent(total)}, name="shim")
    server.start()
    green.in_thread(sys.stdin.read, what="the parent to close stdin", timeout_s=None)


def measure(folder, total):
    """Seconds that `total` bytes take from the agent to the end of file at the FIFO's reader."""
    path, fifo = os.path.join(folder, "agent"), os.path.join(folder, "out")
    os.mkfifo(fifo)
    agent = subprocess.Popen([sys.executable, __file__, "--serve", path, "--mib", str(total >> 20)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    reader = subprocess.Popen(["cat", fifo], stdout=subprocess.DEVNULL)
    try:
        assert agent.stdout.readline() == b"ready\n"
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        client = Client(sock, "the agent")
        request = READ.request(container_id="c1", len=CHUNK_BYTES)
        stdio = open_stdio("", fifo, "", False, container_id="c1")
        started = time.perf_counter()
        copied = copy_out(lambda: client.call(AGENT, "ReadStdout", request).data, stdio.stdout, "stdout")
        reader.wait(30)
        seconds = time.perf_counter() - started
        assert copied == total
        return seconds
    finally:
        for process in (agent, reader):
            process.kill()
            process.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--min-mb-s", type=float, default=100)
    parser.add_argument("--serve", metavar="SOCKET")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.mib << 20)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(folder, options.mib << 20)
    rate = (options.mib << 20) / seconds / 1e6
    print(f"stdout, shim-side: {rate:.0f} MB/s ({options.mib} MiB in {seconds:.2f} s; "
          f"budget {options.min_mb_s:.0f} MB/s)")
    return 0 if rate >= options.min_mb_s else 1


if __name__ == "__main__":
    sys.exit(main())
