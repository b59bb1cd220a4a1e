"""What all tests share: nothing that a test starts or opens may outlive it.

After each test the greenlets that it spawned must have ended, the descriptors that it opened must be
closed, and its child processes be gone. What is on its way out gets a moment. Fixtures of a wider scope
are set up before the look at what there is, and so may stay.
"""

import gc
import os
import sys
import time
import weakref

import gevent
import pytest
from gevent import Greenlet

_HERE = os.path.dirname(os.path.abspath(__file__))
# Where helper modules are. (Test modules themselves are no modules to import: two may have one name.)
sys.path[:0] = [_HERE, *(os.path.join(_HERE, name) for name in
                         ("fakes", "drivers", "resources", "guest", "e2e"))]

_PATIENCE_S = 3.0
_LOOK_S = 0.01
# gevent's and the kernel's own, opened once when they are first needed.
_OF_THE_LOOP = ("anon_inode:[eventpoll]", "anon_inode:[eventfd]", "anon_inode:[timerfd]",
                "anon_inode:[signalfd]", "anon_inode:inotify")

_greenlets = weakref.WeakSet()
Greenlet.add_spawn_callback(_greenlets.add)


@pytest.fixture(autouse=True)
def _nothing_outlives_a_test():
    before = _now()
    yield
    left = _left(before)
    end = time.monotonic() + _PATIENCE_S
    while left and time.monotonic() < end:
        gc.collect()                        # a file object that is garbage is closed, only not yet
        gevent.sleep(_LOOK_S)
        left = _left(before)
    assert not left, "the test leaves behind: " + "; ".join(sorted(left))


def _left(before):
    now = _now()
    return {text for kind in now for key, text in now[kind].items() if key not in before[kind]}


def _now():
    """``{kind: {key: words}}`` of what there is."""
    return {"greenlets": {id(greenlet): f"greenlet {getattr(greenlet, 'name', greenlet)}"
                          for greenlet in list(_greenlets) if greenlet.started and not greenlet.dead},
            "descriptors": _descriptors(), "children": _children()}


def _descriptors():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue                        # that of listdir itself
        if not target.startswith(_OF_THE_LOOP):
            found[name, target] = f"descriptor {name} ({target})"
    return found


def _children():
    found = {}
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children") as children:
                pids = children.read().split()
            for pid in pids:
                with open(f"/proc/{pid}/comm") as comm:
                    program = comm.read().rstrip()
                # By name: a daemon of a wider scope that a test has restarted is no leak.
                count = sum(key[0] == program for key in found)
                found[program, count] = f"child process {pid} ({program})"
        except (FileNotFoundError, ProcessLookupError):
            continue                        # a thread or a child that has just ended
    return found
