"""katashim.shim.reaper, in a process of its own that is a subreaper as the shim is."""

import json
import subprocess
import sys

from .conftest import ROOT

PRELUDE = f"""
import ctypes, json, os, sys
sys.path.insert(0, {ROOT!r})
import gevent
from katashim import child, green
from katashim.shim.reaper import Reaper
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)         # PR_SET_CHILD_SUBREAPER

def orphan(lives_s):
    '''The pid of a process whose parent has ended, so that it is ours now.'''
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        pid = os.fork()
        if pid == 0:
            import time
            time.sleep(lives_s)
            os._exit(7)
        os.write(writer, str(pid).encode())
        os._exit(0)
    os.waitpid(parent, 0)
    return int(os.read(reader, 20))

def exists(pid):
    return os.path.exists(f'/proc/{{pid}}')

def until(condition):
    with green.deadline(10, condition.__doc__ or 'a condition'):
        while not condition():
            gevent.sleep(0.005)
"""


def run(script):
    """Run `script` after the prelude; what it prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", PRELUDE + script], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_an_orphan_that_ends_is_reaped():
    assert run("""
Reaper(second_look_s=0.05).start()
strays = [orphan(0.05) for _ in range(3)]
before = [exists(pid) for pid in strays]
until(lambda: not any(exists(pid) for pid in strays))
print(json.dumps(before))
""") == [True, True, True]


def test_orphans_that_ended_before_it_began_are_reaped():
    assert run("""
stray = orphan(0)
until(lambda: open(f'/proc/{stray}/stat').read().split()[2] == 'Z')
Reaper(second_look_s=0.05).start()
until(lambda: not exists(stray))
print('true')
""")


def test_our_own_children_keep_their_status():
    assert run("""
Reaper(second_look_s=0.001).start()
ours = [child.spawn(['sh', '-c', f'exit {status}'], name='x') for status in range(1, 6)]
strays = [orphan(0) for _ in range(3)]
statuses = [each.wait(10) for each in ours]
until(lambda: not any(exists(pid) for pid in strays))
print(json.dumps(statuses))
""") == [1, 2, 3, 4, 5]


def test_a_child_that_the_subprocess_module_waits_for_is_left_to_it():
    assert run("""
import subprocess
reaper = Reaper()
process = subprocess.Popen(['sh', '-c', 'exit 9'])
os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
looks = [reaper.sweep()]                # sees it for the first time and leaves it
print(json.dumps([looks, process.wait(), reaper.sweep()]))
""") == [[True], 9, False]


def test_nothing_is_done_where_nothing_has_ended():
    assert run("""
reaper = Reaper()
without = reaper.sweep()
process = child.spawn(['sleep', '60'], name='x')
print(json.dumps([without, reaper.sweep()]))
process.stop()
""") == [False, False]
