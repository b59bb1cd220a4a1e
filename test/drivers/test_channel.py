"""The channel: turns in order, poisoned connections, hold, and close() past everything."""

import gevent
import pytest
from gevent.event import Event

from katashim.drivers.channel import Channel
from katashim.errors import ConnectionClosed, DeadlineExceeded

LONG = 5            # a deadline that a working channel never reaches


class Refused(Exception):
    """A complete reply that says no."""


class Line:
    """A connection that counts who uses it, and notices two at once."""

    def __init__(self):
        self.closed = False
        self.users = 0

    def close(self):
        self.closed = True


class Vmm:
    """Hands out connections and remembers them."""

    def __init__(self):
        self.lines = []
        self.log = []

    def connect(self):
        self.lines.append(Line())
        return self.lines[-1]

    def talk(self, word, until=None):
        """An exchange that logs `word`, waits for `until`, and fails if another one is under way."""
        def exchange(line):
            assert line.users == 0 and not line.closed
            line.users += 1
            self.log.append(word)
            try:
                if until is not None:
                    until.wait()
                gevent.sleep(0)
                return word
            finally:
                line.users -= 1
        return exchange


@pytest.fixture
def vmm():
    return Vmm()


@pytest.fixture
def channel(vmm):
    channel = Channel("the VMM", vmm.connect, clean=(Refused,))
    yield channel
    channel.close("the test is over")


@pytest.fixture
def greenlets():
    """Starts greenlets that do not outlive the test."""
    started = []

    def start(function, *args):
        started.append(gevent.spawn(function, *args))
        gevent.sleep(0)             # it runs until it waits
        return started[-1]

    yield start
    gevent.killall(started, timeout=LONG)


def test_exchanges_share_one_connection(channel, vmm):
    assert channel.exchange("a", vmm.talk("a"), LONG) == "a"
    assert channel.exchange("b", vmm.talk("b"), LONG) == "b"
    assert len(vmm.lines) == 1


def test_turns_are_given_in_the_order_of_asking(channel, vmm, greenlets):
    go = Event()
    running = [greenlets(channel.exchange, n, vmm.talk(n, go), LONG) for n in range(20)]
    go.set()
    gevent.joinall(running, timeout=LONG, raise_error=True)
    assert vmm.log == list(range(20))


def test_nobody_slips_in_while_the_turn_is_handed_over(channel, vmm, greenlets):
    go = Event()
    first = greenlets(channel.exchange, "first", vmm.talk("first", go), LONG)
    second = greenlets(channel.exchange, "second", vmm.talk("second"), LONG)

    def chain():
        first.join()
        channel.exchange("late", vmm.talk("late"), LONG)

    late = greenlets(chain)
    go.set()
    gevent.joinall([first, second, late], timeout=LONG, raise_error=True)
    assert vmm.log == ["first", "second", "late"]


def test_a_killed_caller_poisons_the_connection(channel, vmm, greenlets):
    stuck = greenlets(channel.exchange, "stuck", vmm.talk("stuck", Event()), LONG)
    stuck.kill(timeout=LONG)
    assert vmm.lines[0].closed
    assert channel.exchange("next", vmm.talk("next"), LONG) == "next"
    assert len(vmm.lines) == 2


def test_a_timed_out_caller_poisons_the_connection(channel, vmm):
    with pytest.raises(DeadlineExceeded, match="0.01 s while waiting for the VMM to answer 'stuck'"):
        channel.exchange("stuck", vmm.talk("stuck", Event()), 0.01)
    assert vmm.lines[0].closed
    assert channel.exchange("next", vmm.talk("next"), LONG) == "next"


def test_a_refusal_leaves_the_connection_in_use(channel, vmm):
    def refuse(line):
        raise Refused

    with pytest.raises(Refused):
        channel.exchange("refused", refuse, LONG)
    channel.exchange("next", vmm.talk("next"), LONG)
    assert len(vmm.lines) == 1


def test_nonsense_poisons_the_connection(channel, vmm):
    def misread(line):
        raise ValueError("not a reply")

    with pytest.raises(ValueError):
        channel.exchange("misread", misread, LONG)
    assert vmm.lines[0].closed


def test_a_connection_that_the_peer_ended_is_replaced(channel, vmm):
    channel.exchange("a", vmm.talk("a"), LONG)
    vmm.lines[0].closed = True
    channel.exchange("b", vmm.talk("b"), LONG)
    assert len(vmm.lines) == 2


def test_waiting_in_the_queue_has_a_deadline_that_names_the_holder(channel, vmm, greenlets):
    go = Event()
    greenlets(channel.exchange, "device_del", vmm.talk("device_del", go), LONG).name = "unplugger"
    with pytest.raises(DeadlineExceeded) as caught:
        channel.exchange("query", vmm.talk("query"), 0.01)
    assert "a turn at the VMM for 'query': unplugger has had it" in str(caught.value)
    assert "'device_del'" in str(caught.value)
    assert not vmm.lines[0].closed, "it was not this caller's exchange"
    assert not channel.queue().waiting
    go.set()


def test_the_one_killed_while_waiting_leaves_the_queue(channel, vmm, greenlets):
    go = Event()
    first = greenlets(channel.exchange, "first", vmm.talk("first", go), LONG)
    killed = greenlets(channel.exchange, "killed", vmm.talk("killed"), LONG)
    last = greenlets(channel.exchange, "last", vmm.talk("last"), LONG)
    killed.kill(timeout=LONG)
    go.set()
    gevent.joinall([first, last], timeout=LONG, raise_error=True)
    assert vmm.log == ["first", "last"]


def test_the_one_killed_as_the_turn_reaches_it_passes_it_on(channel, vmm, greenlets):
    go = Event()
    victim = None

    def hand_over(line):
        go.wait()
        # By the time the kill is delivered, the turn has been handed to the victim.
        gevent.get_hub().loop.run_callback(victim.throw, gevent.GreenletExit)

    first = greenlets(channel.exchange, "first", hand_over, LONG)
    victim = greenlets(channel.exchange, "victim", vmm.talk("victim"), LONG)
    last = greenlets(channel.exchange, "last", vmm.talk("last"), LONG)
    go.set()
    gevent.joinall([first, victim, last], timeout=LONG, raise_error=True)
    assert vmm.log == ["last"]
    assert channel.queue() == (None, ())


def test_hold_keeps_others_out_between_exchanges(channel, vmm, greenlets):
    go = Event()

    def resize():
        with channel.hold("resize", LONG):
            channel.exchange("info", vmm.talk("info"), LONG)
            go.wait()
            channel.exchange("set", vmm.talk("set"), LONG)

    holder = greenlets(resize)
    other = greenlets(channel.exchange, "other", vmm.talk("other"), LONG)
    go.set()
    gevent.joinall([holder, other], timeout=LONG, raise_error=True)
    assert vmm.log == ["info", "set", "other"]


def test_hold_is_reentrant(channel, vmm):
    with channel.hold("outer", LONG), channel.hold("inner", LONG):
        assert channel.exchange("a", vmm.talk("a"), LONG) == "a"
    assert channel.queue() == (None, ())


def test_a_failed_exchange_within_a_hold_keeps_the_turn(channel, vmm, greenlets):
    with channel.hold("resize", LONG):
        with pytest.raises(DeadlineExceeded):
            channel.exchange("stuck", vmm.talk("stuck", Event()), 0.01)
        waiting = greenlets(channel.exchange, "other", vmm.talk("other"), LONG)
        assert channel.exchange("again", vmm.talk("again"), LONG) == "again"
    waiting.join(LONG)
    assert vmm.log == ["stuck", "again", "other"]


def test_the_deadline_of_a_hold_covers_its_exchanges(channel, vmm):
    with pytest.raises(DeadlineExceeded, match="'resize'"), channel.hold("resize", 0.01):
        channel.exchange("stuck", vmm.talk("stuck", Event()), LONG)
    assert vmm.lines[0].closed
    assert channel.queue() == (None, ())


def test_the_queue_can_be_seen(channel, vmm, greenlets):
    go = Event()

    def unplug():
        with channel.hold("unplug", LONG):
            channel.exchange("device_del", vmm.talk("device_del", go), LONG)

    greenlets(unplug).name = "unplugger"
    greenlets(channel.exchange, "query", vmm.talk("query"), LONG).name = "reader"
    queue = channel.queue()
    assert (queue.holder.who, queue.holder.op) == ("unplugger", "unplug: device_del")
    assert [(place.who, place.op) for place in queue.waiting] == [("reader", "query")]
    assert 0 <= queue.holder.seconds < LONG
    go.set()


def test_close_fails_the_stuck_holder_and_all_waiters_at_once(channel, vmm, greenlets):
    running = [greenlets(channel.exchange, n, vmm.talk(n, Event()), None) for n in range(5)]
    channel.close("the VM is being stopped")
    gevent.joinall(running, timeout=LONG)
    for greenlet in running:
        assert isinstance(greenlet.exception, ConnectionClosed)
        assert "the VM is being stopped" in str(greenlet.exception)
    assert running[0].exception.maybe_executed and not running[1].exception.maybe_executed
    assert vmm.lines[0].closed and vmm.log == [0]
    assert channel.queue() == (None, ())


def test_close_interrupts_a_connect_that_never_ends(greenlets):
    channel = Channel("the VMM", Event().wait)
    stuck = greenlets(channel.exchange, "hello", lambda line: None, None)
    channel.close("stop")
    stuck.join(LONG)
    assert isinstance(stuck.exception, ConnectionClosed)


def test_close_does_not_interrupt_what_the_holder_does_outside_exchanges(channel, greenlets):
    go = Event()

    def hold():
        with channel.hold("resize", LONG):
            go.wait()
            return "unharmed"

    holder = greenlets(hold)
    channel.close("stop")
    gevent.sleep(0)
    go.set()
    assert holder.get(timeout=LONG) == "unharmed"


def test_a_closed_channel_refuses(channel, vmm):
    channel.close("the VM is being stopped")
    channel.close("again")
    with pytest.raises(ConnectionClosed, match="the VMM is closed: the VM is being stopped"):
        channel.exchange("late", vmm.talk("late"), LONG)
    assert vmm.log == [] and vmm.lines == []


@pytest.mark.parametrize("seed", range(30))
def test_no_two_exchanges_overlap_whatever_is_killed(channel, vmm, greenlets, seed):
    """Callers come, are killed and time out in a random order; every exchange is alone on its line."""
    import random
    choose = random.Random(seed)
    running = []
    for number in range(30):
        limit = choose.choice((LONG, LONG, 0.001))
        running.append(greenlets(channel.exchange, number, vmm.talk(number), limit))
        if choose.random() < 0.3:
            gevent.get_hub().loop.run_callback(choose.choice(running).kill, gevent.GreenletExit, False)
    gevent.joinall(running, timeout=LONG)
    for greenlet in running:
        assert greenlet.exception is None or isinstance(greenlet.exception, DeadlineExceeded)
    assert channel.queue() == (None, ())
    assert vmm.log == sorted(vmm.log), "turns were given out of order"
    assert channel.exchange("still works", vmm.talk("still works"), LONG) == "still works"
