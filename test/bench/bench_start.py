"""How fast a shim is there: until `start` has returned, and until the daemon has answered its first RPC.

    .venv/bin/python test/bench/bench_start.py [--rounds 21] [--max-start-ms 15] [--max-reply-ms 100]
                                               [--max-rss-mib 26]

Both are counted from the exec of the program. The first RPC is a Task State, written by hand onto a
socket connected right after `start` has returned, as containerd does it. Prints medians; exits 1
above a budget of SPECIFICATION.md. The daemon is one without a sandbox: its RSS is read when it has
answered, and it is ended by Shutdown.
"""

import argparse
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from katashim.ttrpc import frame, proto, status

PROGRAM = os.path.join(ROOT, "bin", "containerd-shim-katashim-v2")
TASK = "containerd.task.v2.Task"
_DEADLINE_S = 20


def request(method, stream_id, **fields):
    """A whole request frame, as bytes."""
    message = proto.service(TASK)[method].request(**fields)
    body = status.encode_request(TASK, method, message.SerializeToString())
    return frame.encode(stream_id, frame.REQUEST, body)


def measure(folder, number):
    """One shim from start to end: ``(ms until start returned, ms until the first reply, RSS in MiB)``."""
    name = f"bench{number}"
    bundle = os.path.join(folder, name)
    os.mkdir(bundle)
    with open(os.path.join(bundle, "config.json"), "w") as file:
        file.write('{"ociVersion": "1.0.2", "annotations": {}}')
    os.mkfifo(os.path.join(bundle, "log"))
    command = [PROGRAM, "-namespace", "bench", "-address", "/run/c.sock", "-id", name, "start"]
    state, shutdown = request("State", 1, id=name), request("Shutdown", 3, id=name, now=True)

    began = time.perf_counter()
    done = subprocess.run(command, cwd=bundle, capture_output=True, stdin=subprocess.DEVNULL, check=True,
                          env={"KATASHIM_SOCKET_DIR": folder}, timeout=_DEADLINE_S)
    returned = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_DEADLINE_S)
        sock.connect(done.stdout.decode().removeprefix("unix://"))
        sock.sendall(state)
        sock.recv(65536)
        replied = time.perf_counter()
        with open(os.path.join(bundle, "shim.pid")) as file:
            pid = int(file.read())
        rss = rss_mib(pid)
        end(sock, pid, shutdown)
    return (returned - began) * 1000, (replied - began) * 1000, rss


def end(sock, pid, shutdown):
    pidfd = os.pidfd_open(pid)
    try:
        sock.sendall(shutdown)
        if not select.select([pidfd], [], [], _DEADLINE_S)[0]:
            raise SystemExit(f"the shim {pid} does not end")
    finally:
        os.close(pidfd)


def rss_mib(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--max-start-ms", type=float, default=15)
    parser.add_argument("--max-reply-ms", type=float, default=100)
    parser.add_argument("--max-rss-mib", type=float, default=26)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ks-", dir="/tmp") as folder:
        measure(folder, "warm")                 # compiles what has no bytecode yet
        rows = [measure(folder, number) for number in range(options.rounds)]
    start, reply, rss = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"start returns after    {start:6.1f} ms   (budget {options.max_start_ms:g} ms)")
    print(f"first reply after      {reply:6.1f} ms   (budget {options.max_reply_ms:g} ms)")
    print(f"RSS of the idle daemon {rss:6.1f} MiB  (budget {options.max_rss_mib:g} MiB)")
    return int(start > options.max_start_ms or reply > options.max_reply_ms or rss > options.max_rss_mib)


if __name__ == "__main__":
    sys.exit(main())
