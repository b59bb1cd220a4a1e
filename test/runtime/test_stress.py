"""Many clients at once who know nothing of each other: whatever they ask for, the rules hold.

Each client does random things to containers of random names. Afterwards every container's events must be
in the order that containerd relies on, every end told once, every refusal foreseen, and nothing left.
"""

import contextlib
import os
import random
import re
import signal

import gevent
import pytest
from fake_pod import Daemon, InProcess, Place

from katashim import errors, green

CLIENTS, STEPS, NAMES = 8, 25, 4
FORESEEN = {errors.NOT_FOUND, errors.ALREADY_EXISTS, errors.FAILED_PRECONDITION}

# What may be seen of one container's first process, from one create to the next.
LIFE = re.compile(r"create( start)?( oom| paused| resumed)*( exit)?( delete)?")
EXEC = re.compile(r"exec-added( exec-started exit)?")


class Client:
    """One of them."""

    def __init__(self, pod, number, seed):
        self.pod, self.random = pod, random.Random(f"{seed}/{number}")
        self.number, self.refusals = number, []

    def run(self):
        for step in range(STEPS):
            verb = self.random.choice(VERBS)
            try:
                with green.deadline(20, f"{verb.__name__} of client {self.number}"):
                    verb(self, f"c{self.random.randrange(NAMES)}", f"e{self.number}-{step}")
            except errors.KatashimError as exc:
                self.refusals.append(exc)

    def create(self, name, fresh):
        self.pod.create(name, *self.random.choice([("true",), ("sleep", "1000"), ("sh", "-c", "exit 3")]))

    def start(self, name, fresh):
        self.pod.call("Start", id=name)

    def delete(self, name, fresh):
        self.pod.call("Delete", id=name)

    def kill(self, name, fresh):
        self.pod.call("Kill", id=name, signal=9, all=self.random.random() < 0.5)

    def look(self, name, fresh):
        self.pod.call(self.random.choice(["State", "Pids", "Connect"]), id=name)

    def pause(self, name, fresh):
        self.pod.call("Pause", id=name)

    def resume(self, name, fresh):
        self.pod.call("Resume", id=name)

    def exec(self, name, fresh):
        self.pod.exec(name, fresh, "true")
        try:
            self.pod.call("Wait", id=name, exec_id=fresh, timeout_s=1)
        except errors.DeadlineExceeded:
            return                          # somebody has paused it, and goes on to forget it
        self.pod.call("Delete", id=name, exec_id=fresh)


VERBS = [Client.create, Client.create, Client.start, Client.start, Client.delete, Client.kill, Client.look,
         Client.pause, Client.resume, Client.exec]


SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 30))]


@pytest.mark.parametrize("kind", [InProcess, Daemon])
@pytest.mark.parametrize("seed", SEEDS)
def test_many_clients(kind, seed):
    place = Place()
    pod = kind(place)
    try:
        pod.start(pod.id, "sleep", "1000")
        clients = [Client(pod, number, seed) for number in range(CLIENTS)]
        gevent.joinall([gevent.spawn(client.run) for client in clients], raise_error=True)
        clean_up(pod)
        refusals = [exc for client in clients for exc in client.refusals]
        assert not [exc for exc in refusals if not foreseen(exc)]
        pod.shut_down()
        pod.events.wait(pod.id, "exit")
        for name in range(NAMES):
            check_events(pod.events.of(f"c{name}"))
        pod.nothing_is_left()
    finally:
        pod.close()
        place.remove()


FATES = {
    "the VMM dies": lambda pod: os.kill(pod.vmm_pid(), signal.SIGKILL),
    "the agent hangs up": lambda pod: pod.order(hangup=True),
    "it is shut down": lambda pod: pod.spawn("Shutdown", id=pod.id, now=True),
}


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_end_of_the_pod_in_the_midst_of_many_clients(fate, seed):
    place = Place()
    pod = InProcess(place)
    try:
        pod.start(pod.id, "sleep", "1000")
        clients = [Client(pod, number, seed) for number in range(CLIENTS)]
        running = [gevent.spawn(client.run) for client in clients]
        gevent.sleep(0.02 * (seed % 5 + 1))
        FATES[fate](pod)
        gevent.joinall(running, timeout=20, raise_error=True)
        assert all(each.ready() for each in running)
        assert pod.sandbox.life.reached("stopped").wait(10)
        refusals = [exc for client in clients for exc in client.refusals]
        assert not [exc for exc in refusals if not foreseen(exc) and exc.code != errors.UNAVAILABLE]
        clean_up(pod)
        pod.nothing_is_left()
        pod.flush()
        assert pod.events.of(pod.id)[:3] == ["create", "start", "exit"]
        for name in range(NAMES):
            check_events(pod.events.of(f"c{name}"))
    finally:
        pod.close()
        place.remove()


def foreseen(exc):
    """Who starts what another kills at that moment may hear the guest's own words."""
    return exc.code in FORESEEN or "the guest's agent refused" in str(exc)


def clean_up(pod):
    """End and delete what is left, as its owner would."""
    for name in range(NAMES):
        try:
            if pod.status(f"c{name}") == "paused":
                with contextlib.suppress(errors.FailedPrecondition):    # it has been killed just now
                    pod.call("Resume", id=f"c{name}")
            pod.remove(f"c{name}")
        except errors.NotFound:
            continue


def check_events(names):
    """Assert that the events of one name make whole lives."""
    execs = {}
    for name in [name for name in names if " " in name]:
        verb, exec_id = name.split()
        execs.setdefault(exec_id, []).append(verb)
    for exec_id, verbs in execs.items():
        assert EXEC.fullmatch(" ".join(verbs)), (exec_id, verbs)
    first = " ".join(name for name in names if " " not in name)
    lives = ["create" + rest for rest in first.split("create")[1:]]
    for life in lives:
        assert LIFE.fullmatch(life.strip()), (life, names)
        assert life.count("exit") == life.count("delete") == 1, (life, names)
        assert life.index("exit") < life.index("delete")
