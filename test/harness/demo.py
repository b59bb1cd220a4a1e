"""``make demo``: containers in virtual machines, by an unmodified containerd and plain ctr.

Each step is printed with the time it took. The last line is ``leaks: none``, from a comparison of the
machine with what it was before. Anything unexpected ends it with status 1 and says what; Ctrl-C ends
it with status 130. In every case it cleans up. KATASHIM_DEMO_CONFIG may hold more lines of katashim's
configuration.
"""

import contextlib
import json
import os
import signal
import sys
import time

if not __package__:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from harness import image, leaks
from harness.containerd import KATASHIM, Containerd, Failed
from harness.terminal import PRINT_SIZE

_CONFIG = "# The demo's: everything is as defaults/qemu.conf has it.\n"
_SANDBOX = {"io.kubernetes.cri.container-type": "sandbox"}
_MEMBER = {"io.kubernetes.cri.container-type": "container"}
_BAR_COLUMNS = 48
# What a start goes through; the order and the times are the shim's own records.
_PHASES = ("spawn", "kernel", "agent", "network", "create", "start")


class Unexpected(Exception):
    """The demo saw something else than it should."""


class Demo:
    """The steps, on a running :class:`Containerd`."""

    def __init__(self, daemon, runtime=KATASHIM):
        self.daemon, self.runtime = daemon, runtime
        self._began = time.monotonic()

    @contextlib.contextmanager
    def step(self, title):
        """Print the block's title with its time, then the details that it added to the list it got."""
        details = []
        began = time.monotonic()
        yield details
        now = time.monotonic()
        print(f"{now - self._began:7.2f} s  {title}  ({(now - began) * 1000:.0f} ms)", flush=True)
        for detail in details:
            print(f"{'':11}{detail}", flush=True)

    def prepare(self):
        with self.step("a private containerd") as details:
            self.daemon.start()
            details.append(f"version {'.'.join(map(str, self.daemon.version()))} in {self.daemon.directory}")
        with self.step(f"a busybox image, made on the spot: {image.NAME}"):
            self.daemon.import_busybox()

    def run_one(self):
        """A container prints the guest's kernel and exits with 7."""
        with self.step("ctr run: print the kernel's version and exit with 7") as details:
            result = self.daemon.run("demo-uname", "sh", "-c", "uname -r; exit 7", options=["--rm"],
                                     runtime=self.runtime, code=7)
            guest, host = result.out.strip(), os.uname().release
            details.append(f"the guest's kernel is {guest}, the host's is {host}; ctr exited with 7")
            expect(guest and guest != host, f"{guest!r} is the host's kernel")

    def exec_and_waterfall(self):
        """Another process in a running container; where the time of its start went."""
        with self.step("ctr run -d: a container that stays"):
            self.daemon.run("demo-exec", "sleep", "1000", options=["-d"], runtime=self.runtime)
        with self.step("ctr task exec: a second process in it") as details:
            result = self.daemon.ctr("task", "exec", "--exec-id", "e1", "demo-exec",
                                     "sh", "-c", "echo from process $$; exit 3", code=3)
            details.append(f"it says {result.out.strip()!r}; ctr exited with 3")
            expect(result.out.startswith("from process "), result)
        with self.step("where the time of the start went") as details:
            details += waterfall(read_timeline("demo-exec"))

    def terminal(self):
        """A container on a terminal of 30 x 100."""
        with self.step("ctr run -t: a container on a terminal") as details:
            arguments = ("run", "--rm", "-t", "--runtime", self.runtime, image.NAME, "demo-tty",
                         "sh", "-c", f"tty; {PRINT_SIZE}; read word; echo got $word")
            with self.daemon.terminal(*arguments, rows=30, columns=100) as terminal:
                device = terminal.read_until(b"\n").decode().strip()
                size = terminal.read_until(b"\n").decode().strip()
                terminal.send(b"a line\n")
                terminal.read_until(b"got a line", timeout_s=20)
                code, rest = terminal.wait()
            details.append(f"tty is {device}, size {size}, it answered the line, ctr exited with {code}")
            expect(device.startswith("/dev/"), f"the terminal is {device}")
            expect((code, size) == (0, "30 100"), f"status {code}, size {size}, then {rest!r}")

    def pod(self):
        """A sandbox container and two members, as a CRI runtime marks them."""
        before = leaks.snapshot()
        with self.step("a pod: a sandbox container and two members") as details:
            self._run_in_pod("demo-pod", _SANDBOX)
            for name in ("demo-member-1", "demo-member-2"):
                self._run_in_pod(name, _MEMBER)
            boots = {self._boot_id(name) for name in ("demo-pod", "demo-member-1", "demo-member-2")}
            new = [thing for thing in leaks.compare(before)
                   if thing.startswith("process") and "demo-" in thing]
            vms = sum("qemu-system" in thing for thing in new)
            shims = sum("containerd-shim-katashim-v2" in thing for thing in new)
            details.append(f"three containers, {shims} shim, {vms} virtual machine")
            expect((vms, shims, len(boots)) == (1, 1, 1),
                   f"{vms} virtual machines, {shims} shims, {len(boots)} kernels:\n  " + "\n  ".join(new))
            expect(self._boot_id("demo-exec") not in boots, "the pod shares its kernel with another container")

    def _run_in_pod(self, name, annotations):
        marks = {**annotations, "io.kubernetes.cri.sandbox-id": "demo-pod"}
        options = [word for key, value in marks.items() for word in ("--annotation", f"{key}={value}")]
        self.daemon.run(name, "sleep", "1000", options=["-d", *options], runtime=self.runtime)

    def _boot_id(self, name):
        return self.daemon.ctr("task", "exec", "--exec-id", "boot-id", name,
                               "cat", "/proc/sys/kernel/random/boot_id").out.strip()

    def signals(self):
        """The exit status of a killed container is 128 plus the signal."""
        for name, number in (("SIGKILL", 137), ("SIGTERM", 143)):
            with self.step(f"ctr task kill -s {name}: ctr run exits with {number}"):
                # The first process of a PID namespace has no default actions, so it needs a trap.
                command = "trap 'exit 143' TERM; echo ready; while :; do sleep 0.1; done"
                container = f"demo-{name.lower()}"
                running = self.daemon.start_run(container, "sh", "-c", command, options=["--rm"],
                                                runtime=self.runtime)
                try:
                    running.read_line()
                    self.daemon.ctr("task", "kill", "-s", name, container)
                    result = running.wait(30)
                finally:
                    running.kill()
                expect(result.code == number, result)

    def delete(self):
        """Everything goes, members before their sandbox."""
        with self.step("ctr task rm -f and ctr container rm, for all that runs") as details:
            names = ("demo-exec", "demo-member-2", "demo-member-1", "demo-pod")
            for name in names:
                self.daemon.ctr("task", "rm", "-f", name, check=False)      # exits as the task did
                self.daemon.ctr("container", "rm", name)
            expect(self.daemon.tasks() == {}, f"tasks are left: {self.daemon.tasks()}")
            details.append(", ".join(names))

    def run(self):
        """All steps."""
        for step in (self.prepare, self.run_one, self.exec_and_waterfall, self.terminal, self.pod,
                     self.signals, self.delete):
            step()


def expect(condition, what):
    """:raises Unexpected: the condition does not hold."""
    if not condition:
        raise Unexpected(str(what))


def read_timeline(name):
    """The phases of a sandbox's start, from its state.json. :raises Unexpected: they are not there."""
    path = f"/run/kata/{name}/state.json"
    try:
        with open(path) as file:
            phases = json.load(file)["timeline"]
    except (OSError, ValueError, KeyError) as exc:
        raise Unexpected(f"no timeline in {path}: {exc!r}") from exc
    missing = set(_PHASES) - {phase["phase"] for phase in phases}
    expect(not missing, f"the timeline in {path} lacks {', '.join(sorted(missing))}: {phases}")
    return phases


def waterfall(phases):
    """Lines that show phases ``{"phase", "start_ms", "ms"}`` as bars on a common scale."""
    phases = [phase for phase in phases if phase["ms"] is not None]
    end = max(phase["start_ms"] + phase["ms"] for phase in phases)
    scale = _BAR_COLUMNS / end
    lines = []
    for phase in phases:
        left = int(phase["start_ms"] * scale)
        width = max(1, round(phase["ms"] * scale))
        bar = " " * left + "#" * width
        lines.append(f"{phase['phase']:<10} {bar:<{_BAR_COLUMNS + 1}} {phase['ms']:7.0f} ms")
    return lines


def clean_up(daemon, before):
    """End containerd and all containers; returns what is left of them, one line each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        daemon.close()
    except (Failed, OSError) as exc:
        return [f"the clean-up failed: {exc}", *leaks.wait_clean(before)]
    return leaks.wait_clean(before)


def _interrupt(number, frame):
    raise KeyboardInterrupt


def main():
    """Returns the exit status."""
    if os.geteuid() != 0:
        print("the demo needs root: it runs containerd and virtual machines", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):     # also where SIGINT came in ignored, as in CI
        signal.signal(number, _interrupt)
    before = leaks.snapshot()
    daemon = Containerd(config=_CONFIG + os.environ.get("KATASHIM_DEMO_CONFIG", ""))
    status = 0
    try:
        Demo(daemon).run()
    except (Unexpected, Failed, AssertionError) as exc:
        print(f"\nUNEXPECTED: {exc}", file=sys.stderr)
        if isinstance(exc, Unexpected):
            print(daemon.log_tail(), file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\ninterrupted; cleaning up", file=sys.stderr)
        status = 130
    finally:
        left = clean_up(daemon, before)
    if left:
        print("leaks:\n  " + "\n  ".join(left), flush=True)
        return status or 1
    print("leaks: none", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
