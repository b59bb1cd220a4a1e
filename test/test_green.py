"""katashim.green: deadlines that name what they waited for, native threads, recycled workers."""

import subprocess
import sys
import threading
import time

import gevent
import pytest
from gevent.event import Event

from katashim import green
from katashim.errors import Cancelled, DeadlineExceeded


# -- deadlines ------------------------------------------------------------------------------------
def test_a_deadline_names_what_was_waited_for():
    with pytest.raises(DeadlineExceeded, match=r"^nothing after 0.01 s while waiting for the agent$"):
        with green.deadline(0.01, "the agent"):
            Event().wait()


def test_what_was_waited_for_may_be_found_out_late():
    progress = []
    with pytest.raises(DeadlineExceeded, match="2 of 3"):
        with green.deadline(0.01, lambda: f"{len(progress)} of 3"):
            progress += "ab"
            Event().wait()


def test_in_time_is_in_time():
    with green.deadline(5, "nothing"), green.deadline(None, "nothing at all"):
        gevent.idle()


def test_the_outer_of_two_deadlines_is_told_as_the_outer():
    with pytest.raises(DeadlineExceeded, match="the outer"):
        with green.deadline(0.01, "the outer"), green.deadline(5, "the inner"):
            Event().wait()


def test_an_error_of_the_block_passes_and_the_clock_is_stopped():
    with pytest.raises(ValueError), green.deadline(0.02, "nothing"):
        raise ValueError
    gevent.sleep(0.03)                      # no timeout out of the blue


def test_a_timeout_of_somebody_else_is_not_ours():
    with pytest.raises(gevent.Timeout):
        with gevent.Timeout(0.01), green.deadline(5, "ours"):
            Event().wait()


def test_a_stopwatch_runs_down_and_not_below():
    watch = green.Stopwatch(0.02)
    assert 0 < watch.left() <= 0.02
    gevent.sleep(0.03)
    assert watch.left() == 0 and watch.left(least=1) == 1


# -- threads --------------------------------------------------------------------------------------
def test_a_call_that_blocks_does_not_block_the_others():
    ran, go = [], threading.Event()
    gevent.spawn_later(0.01, lambda: (ran.append(1), go.set()))
    assert green.in_thread(go.wait, 5, what="waiting") is True
    assert ran == [1]


def test_errors_and_arguments_come_through():
    assert green.in_thread(divmod, 7, 2, what="dividing") == (3, 1)
    with pytest.raises(ZeroDivisionError):
        green.in_thread(divmod, 7, 0, what="dividing")


def test_a_thread_that_hangs_is_left_behind():
    go = threading.Event()
    with pytest.raises(DeadlineExceeded, match="nothing after 0.02 s while waiting for unmounting /x"):
        green.in_thread(go.wait, 5, what="unmounting /x", timeout_s=0.02)
    go.set()
    assert green.in_thread(int, "7", what="another call") == 7


# -- greenlets ------------------------------------------------------------------------------------
def test_a_greenlet_has_a_name_and_its_failure_is_logged(caplog):
    greenlet = green.spawn("the watcher", lambda: 1 / 0)
    assert greenlet.name == "the watcher"
    greenlet.join()
    assert greenlet.value is None and greenlet.successful()
    assert "greenlet the watcher failed" in caplog.text and "ZeroDivisionError" in caplog.text
    assert green.spawn("adder", max, 1, 2).get() == 2


# -- workers --------------------------------------------------------------------------------------
def test_workers_are_used_again():
    pool, seen = green.WorkerPool("test"), []
    for _ in range(3):
        pool.submit(lambda: seen.append(gevent.getcurrent()))
        gevent.idle()
    assert len(seen) == 3 and len(set(seen)) == 1


def test_calls_run_at_the_same_time():
    pool, here, go = green.WorkerPool("test"), [], Event()

    def call(number):
        here.append(number)
        go.wait()
        here.append(-number)
    jobs = [pool.submit(call, number) for number in range(1, 101)]
    gevent.idle()
    assert sorted(here) == list(range(1, 101)) and not any(job.done for job in jobs)
    go.set()
    gevent.idle()
    gevent.idle()
    assert all(job.done for job in jobs) and len(here) == 200
    assert len(pool._idle) == 64            # no more than that are kept


def test_a_call_that_fails_does_not_end_its_worker(caplog):
    pool, seen = green.WorkerPool("test"), []
    pool.submit(lambda: 1 / 0)
    gevent.idle()
    pool.submit(seen.append, 7)
    gevent.idle()
    assert seen == [7] and "in pool test failed" in caplog.text


def test_a_call_is_cancelled_where_it_waits():
    pool, seen = green.WorkerPool("test"), []

    def call():
        try:
            Event().wait()
        except Cancelled as exc:
            seen.append(str(exc))
    job = pool.submit(call)
    gevent.idle()
    job.cancel(Cancelled("the client has gone"))
    gevent.idle()
    assert seen == ["the client has gone"] and job.done


def test_cancelling_what_has_ended_harms_nobody():
    pool, seen = green.WorkerPool("test"), []
    first = pool.submit(seen.append, 1)
    gevent.idle()
    first.cancel(Cancelled("too late"))
    second = pool.submit(lambda: (gevent.idle(), seen.append(2)))     # in the same worker
    first.cancel(Cancelled("far too late"))
    for _ in range(4):
        gevent.idle()
    assert seen == [1, 2] and second.done


def test_a_call_that_has_not_begun_can_be_cancelled(caplog):
    """The Cancelled is raised at its first switch point, not in the worker's own code."""
    pool, seen = green.WorkerPool("test"), []
    pool.submit(seen.append, 0)
    gevent.idle()

    def call():
        try:
            gevent.sleep(5)
        except Cancelled:
            seen.append("cancelled")
    job = pool.submit(call)
    job.cancel(Cancelled("at once"))
    for _ in range(4):
        gevent.idle()
    assert seen == [0, "cancelled"] and job.done
    pool.submit(seen.append, "still works")
    gevent.idle()
    assert seen[-1] == "still works"


# -- the patching ---------------------------------------------------------------------------------
def test_the_daemon_is_patched_lean():
    script = ("from katashim import green; green.patch(); import sys, socket, subprocess, threading, time, os, gevent;"
              "assert 'gevent' in socket.socket.__module__ and time.sleep.__module__ == 'gevent.hub';"
              "assert threading.current_thread().name == 'MainThread';"
              "assert os.fork.__module__ == 'posix' and subprocess.Popen.__module__ == 'subprocess';"
              "print(sorted(set(sys.modules) & {'ssl', 'gevent.ssl', 'pkg_resources', 'asyncio', 'importlib.metadata'}))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.strip() == "[]"


def test_deadlines_work_in_a_patched_process():
    script = ("from katashim import green; green.patch(); import time, threading;"
              "from katashim.errors import DeadlineExceeded\n"
              "try:\n"
              "    with green.deadline(0.02, 'a lock'):\n"
              "        threading.Event().wait()\n"
              "except DeadlineExceeded as exc:\n"
              "    print(exc)\n"
              "print(green.in_thread(pow, 2, 5, what='x'))\n")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "nothing after 0.02 s while waiting for a lock\n32\n"
    assert time.monotonic() - began < 10
