"""katashim.runtime.lifecycle: the table, pair by pair, and its owner."""

import gevent
import pytest
from gevent.event import Event

from katashim.errors import HypervisorError
from katashim.runtime import lifecycle
from katashim.runtime.lifecycle import BOOTING, INIT, READY, STOPPED, STOPPING, Lifecycle

WAIT_S = 5
STATES = (INIT, BOOTING, READY, STOPPING, STOPPED)
VERBS = ("boot", "booted", "boot-failed", "stop", "vmm-exited", "agent-lost", "share-lost", "torn-down")

# Written anew, not taken from the code: what each verb does in each state. No entry: nothing.
WANTED = {
    INIT: {"boot": BOOTING, "stop": STOPPED},
    BOOTING: {"booted": READY, "boot-failed": STOPPING, "stop": STOPPING, "vmm-exited": STOPPING,
              "share-lost": STOPPING},
    READY: {"stop": STOPPING, "vmm-exited": STOPPING, "agent-lost": STOPPING, "share-lost": STOPPING},
    STOPPING: {"torn-down": STOPPED},
    STOPPED: {},
}
# How to get there.
WAY = {INIT: [], BOOTING: ["boot"], READY: ["boot", "booted"], STOPPING: ["boot", "stop"],
       STOPPED: ["boot", "stop", "torn-down"]}


@pytest.fixture
def made():
    """Makes lifecycles, and ends their owners."""
    lives = []

    def make(entering=None):
        lives.append(Lifecycle("s1", entering or {}))
        return lives[-1]
    yield make
    for life in lives:
        for verb in ("boot", "stop", "torn-down"):
            life.post(verb)
        assert life.reached(STOPPED).wait(WAIT_S)


def settle():
    """Let all that can run do so."""
    for _ in range(5):
        gevent.idle()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("verb", VERBS)
def test_every_pair_of_state_and_verb(made, state, verb):
    life = made()
    for step in WAY[state]:
        life.post(step)
    settle()
    assert life.state == state
    life.post(verb)
    settle()
    assert life.state == WANTED[state].get(verb, state)


def test_the_table_names_no_other_states_and_verbs():
    assert {state for state, _ in lifecycle.TABLE} | set(lifecycle.TABLE.values()) == set(STATES)
    assert {verb for _, verb in lifecycle.TABLE} == set(VERBS)


def test_from_every_state_there_is_a_way_to_the_end():
    """Whatever happens, a `stop` leads to STOPPED: nothing hangs."""
    for state in STATES[:-1]:
        following = lifecycle.TABLE.get((state, "stop"), state)
        assert following == STOPPED or lifecycle.TABLE[following, "torn-down"] == STOPPED


def test_the_work_of_a_state_runs_once_beside_the_owner(made):
    began, go = [], Event()

    def work():
        began.append(life.state)
        go.wait(WAIT_S)
    life = made({BOOTING: work, STOPPING: work})
    life.post("boot")
    settle()
    assert began == [BOOTING] and life.state == BOOTING
    for _ in range(10):
        life.post("stop")               # heard while the boot waits; ten of them are one
    settle()
    assert began == [BOOTING, STOPPING] and life.state == STOPPING
    go.set()


def test_those_who_wait_hear_of_it(made):
    life = made()
    waiters = [gevent.spawn(life.reached(state).wait, WAIT_S) for state in (READY, STOPPING, STOPPED)]
    for verb in ("boot", "booted", "stop", "torn-down"):
        life.post(verb)
    assert [waiter.get() for waiter in waiters] == [True, True, True]


@pytest.mark.parametrize("way, settled", [
    ([], False), (["boot"], False), (["boot", "booted"], True), (["boot", "boot-failed"], True),
    (["boot", "vmm-exited"], True), (["stop"], True)])
def test_a_bring_up_is_over_when_it_is_up_or_on_its_way_down(made, way, settled):
    life = made()
    for verb in way:
        life.post(verb)
    settle()
    assert life.settled.is_set() == settled


def test_the_first_cause_is_kept(made):
    life = made()
    life.post("boot")
    life.post("booted")
    error = HypervisorError("QEMU is gone")
    life.post("vmm-exited", error)
    life.post("agent-lost", "a consequence")
    life.post("torn-down", "another")
    settle()
    assert life.cause is error


def test_a_cause_that_nobody_gave_is_the_verb(made):
    life = made()
    life.post("boot")
    life.post("booted", "no news")
    settle()
    assert life.cause is None
    life.post("stop")
    settle()
    assert life.cause == "it was told to stop"


def test_work_that_fails_does_not_take_the_owner_along(made, caplog):
    def broken():
        raise ZeroDivisionError
    life = made({BOOTING: broken})
    life.post("boot")
    settle()
    assert "booting of s1 failed" in caplog.text
    life.post("stop")
    settle()
    assert life.state == STOPPING


def test_the_owner_ends_with_the_sandbox(made):
    life = made()
    life.post("stop")
    settle()
    assert life._owner.dead
