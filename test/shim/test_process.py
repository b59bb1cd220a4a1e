"""katashim.shim.process, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from katashim.resources import mounts

from .conftest import ROOT

LOOK = """
import json, os, signal, subprocess, sys
sys.path.insert(0, sys.argv[1])
host = os.readlink('/proc/self/ns/mnt')
from katashim.shim import process
process.isolate()
os.kill(os.getpid(), signal.SIGTERM)                    # does nothing
import ctypes
reaper = ctypes.c_int()
ctypes.CDLL(None).prctl(37, ctypes.byref(reaper), 0, 0, 0)
inherited = subprocess.run(['grep', 'SigIgn', '/proc/self/status'], capture_output=True, text=True)
root = [line.split() for line in open('/proc/self/mountinfo') if line.split()[4] == '/']
print(json.dumps({
    'own_mounts': os.readlink('/proc/self/ns/mnt') != host,
    'subreaper': reaper.value,
    'comm': open('/proc/self/comm').read().strip(),
    'oom': int(open('/proc/self/oom_score_adj').read()),
    'child_ignores': int(inherited.stdout.split()[1], 16),
    'optional': root[-1][6:root[-1].index('-')],
}), flush=True)
if len(sys.argv) > 2:
    from katashim.resources import mounts
    mounts.mount('tmpfs', sys.argv[2], 'tmpfs')
    print('mounted', flush=True)
    sys.stdin.readline()
"""


def look(*arguments, environment=None):
    done = subprocess.run([sys.executable, "-c", LOOK, ROOT, *arguments], capture_output=True, timeout=30,
                          check=False, env={**os.environ, **(environment or {})})
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_what_the_daemon_is_to_the_kernel():
    with open("/proc/self/oom_score_adj") as file:
        ours = int(file.read())
    seen = look()
    assert seen["own_mounts"] and seen["subreaper"] == 1
    assert seen["comm"] == "containerd-shim"
    assert seen["oom"] == min(ours + 1, 1000)


def test_children_do_not_inherit_that_sigterm_does_nothing():
    assert look()["child_ignores"] & 1 << 14 == 0        # SIGTERM is 15


def test_its_mounts_are_shared_below_it_and_slave_to_the_host():
    kinds = {word.partition(":")[0] for word in look()["optional"]}
    assert "shared" in kinds


def test_what_it_mounts_is_not_seen_by_the_host(tmp_path):
    running = subprocess.Popen([sys.executable, "-c", LOOK, ROOT, str(tmp_path)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    try:
        running.stdout.readline()
        assert running.stdout.readline() == "mounted\n"
        assert str(tmp_path) in [entry.target for entry in mounts.table(running.pid)]
        assert not mounts.is_mount_point(str(tmp_path))
    finally:
        running.communicate("done\n", timeout=30)


def test_core_scheduling_is_no_reason_to_fail():
    assert look(environment={"SCHED_CORE": "1"})["subreaper"] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_without_the_right_to_it_the_error_says_what_is_missing():
    script = ("import os, sys; sys.path.insert(0, sys.argv[1])\nfrom katashim.shim import process\n"
              "from katashim.errors import KatashimError\nos.setuid(65534)\n"
              "try:\n    process.isolate()\nexcept KatashimError as exc:\n    print(exc)")
    done = subprocess.run([sys.executable, "-c", script, ROOT], capture_output=True, timeout=30, check=True)
    assert b"mount namespace" in done.stdout
