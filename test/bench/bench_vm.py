"""What katashim itself adds to a container in a VM: its share of a start, an exec's round trip, memory.

Boots real VMs by a private containerd. The guest's own boot (the phases kernel and agent) is not counted:
it depends on the host and the kernel. Prints one line a figure; ``--check`` fails when one is over budget
(SPECIFICATION.md).
"""

import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from harness.containerd import Containerd  # noqa: E402

from katashim import state  # noqa: E402
from katashim.ttrpc import proto  # noqa: E402
from katashim.ttrpc.client import Client  # noqa: E402

RUNS, EXECS = 5, 30
SERVICE = "containerd.task.v2.Task"
BUDGETS = {"share_ms": 250, "exec_ms": 60, "rss_mib": 30}


def connect(daemon, name):
    """A ttRPC client of the shim of container `name`."""
    from gevent import socket
    with open(f"{daemon.state}/io.containerd.runtime.v2.task/default/{name}/address") as file:
        path = file.read().strip().removeprefix("unix://")
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return Client(sock, "the shim")


def share_of_a_start(daemon, name):
    """Milliseconds from `ctr run` to the container's first output, less the guest's boot."""
    began = time.monotonic()
    running = daemon.start_run(name, "sh", "-c", "echo there; exec sleep 600")
    try:
        running.read_line()
        seconds = time.monotonic() - began
        boot = sum(phase["ms"] for phase in state.read(state.run_dir(name))["timeline"]
                   if phase["phase"] in ("spawn", "kernel", "agent"))
    finally:
        daemon.remove_all()
        running.kill()
    return seconds * 1000 - boot


def round_trips_of_exec(client, name):
    """Milliseconds of each Exec, Start, Wait and Delete of `true`."""
    def call(method, **fields):
        request = proto.service(SERVICE)[method].request
        return client.call(SERVICE, method, proto.build(request, id=name, **fields), timeout_s=30)

    spec = {"type_url": "types.containerd.io/opencontainers/runtime-spec/1/Process",
            "value": b'{"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}}'}
    times = []
    for number in range(EXECS):
        began = time.monotonic()
        call("Exec", exec_id=f"e{number}", spec=spec)
        call("Start", exec_id=f"e{number}")
        call("Wait", exec_id=f"e{number}")
        call("Delete", exec_id=f"e{number}")
        times.append((time.monotonic() - began) * 1000)
    return times


def memory_of(pid):
    """RSS of a process in MiB."""
    with open(f"/proc/{pid}/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024


def main():
    figures = {}
    with Containerd() as daemon:
        daemon.import_busybox()
        shares = [share_of_a_start(daemon, f"bench-start{number}") for number in range(RUNS)]
        figures["share_ms"] = statistics.median(shares)
        daemon.run("bench-exec", "sleep", "600", options=("-d",))
        client = connect(daemon, "bench-exec")
        times = round_trips_of_exec(client, "bench-exec")
        figures["exec_ms"] = statistics.median(times)
        figures["rss_mib"] = memory_of(state.read(state.run_dir("bench-exec"))["shim_pid"])
        client.close()
    for name, value in figures.items():
        print(f"{name}: {value:.1f} (budget {BUDGETS[name]})")
    over = [name for name, value in figures.items() if value > BUDGETS[name]]
    if over and "--check" in sys.argv:
        sys.exit(f"over budget: {', '.join(over)}")


if __name__ == "__main__":
    main()
