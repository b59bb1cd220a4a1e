"""katashim.services.events against a real ttRPC server: order, exactly once, restarts, bounds."""

import logging
import os
import socket

import pytest
from gevent.event import Event

from katashim import green
from katashim.errors import InvalidArgument
from katashim.services.events import Publisher
from katashim.ttrpc import proto
from katashim.ttrpc.server import Server

SERVICE = "containerd.services.events.ttrpc.v1.Events"
TaskStart = proto.get("containerd.events.TaskStart")
TaskExit = proto.get("containerd.events.TaskExit")


class Containerd:
    """The event service of one life of containerd, on the socket at `path`."""

    def __init__(self, path, refuse=(), hang_on=None):
        if os.path.exists(path):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        self.envelopes, self.metadata = [], []
        self.hung = Event()
        self._refuse, self._hang_on = refuse, hang_on
        self._server = Server(listener, {SERVICE: self}, name="shim")
        self._server.start()

    def Forward(self, request, context):
        envelope = request.envelope
        if envelope.topic == self._hang_on:
            self.hung.set()
            Event().wait()          # until the connection is closed
        if envelope.topic in self._refuse:
            raise InvalidArgument("no such topic")
        self.envelopes.append(envelope)
        self.metadata.append(context.metadata)

    def pids(self):
        return [proto.unpack_any(envelope.event).pid for envelope in self.envelopes]

    def stop(self):
        self._server.stop()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "ttrpc")


@pytest.fixture
def publisher(path):
    made = []

    def make(**options):
        made.append(Publisher(path, "k8s.io", **options))
        return made[-1]
    yield make
    for each in made:
        each.close()


@pytest.fixture
def containerd(path):
    made = []

    def make(**options):
        made.append(Containerd(path, **options))
        return made[-1]
    yield make
    for each in made:
        each.stop()


def publish(publisher, numbers, topic="/tasks/start"):
    for number in numbers:
        publisher.publish(topic, TaskStart(container_id="c", pid=number))


def test_an_envelope_is_what_containerd_expects(containerd, publisher):
    server, events = containerd(), publisher()
    events.publish("/tasks/exit", TaskExit(container_id="c", id="c", pid=7, exit_status=137))
    assert events.flush(5)
    envelope, = server.envelopes
    assert envelope.namespace == "k8s.io"
    assert envelope.topic == "/tasks/exit"
    assert envelope.event.type_url == "containerd.events.TaskExit"
    assert TaskExit.FromString(envelope.event.value).exit_status == 137
    assert envelope.timestamp.seconds > 1_700_000_000
    assert server.metadata[0]["containerd-namespace-ttrpc"] == ["k8s.io"]


def test_many_events_arrive_in_order_and_once_each(containerd, publisher):
    server, events = containerd(), publisher()
    publish(events, range(1, 501))
    assert events.flush(5)
    assert server.pids() == list(range(1, 501))


def test_events_published_before_containerd_listens_are_delivered_when_it_does(containerd, publisher):
    events = publisher()
    publish(events, [1, 2, 3])
    assert not events.flush(0.01)
    server = containerd()
    assert events.flush(5)
    assert server.pids() == [1, 2, 3]


def test_a_restart_of_containerd_loses_none_and_doubles_none(containerd, publisher):
    first, events = containerd(hang_on="/tasks/exit"), publisher()
    publish(events, [1, 2])
    publish(events, [3], topic="/tasks/exit")       # taken, but never acknowledged
    publish(events, [4, 5])
    assert first.hung.wait(5)
    first.stop()
    second = containerd()
    assert events.flush(5)
    assert first.pids() == [1, 2]
    assert second.pids() == [3, 4, 5]


def test_a_connection_that_ended_while_idle_is_replaced(containerd, publisher):
    first, events = containerd(), publisher()
    publish(events, [1])
    assert events.flush(5)
    first.stop()
    second = containerd()
    publish(events, [2])
    assert events.flush(5)
    assert second.pids() == [2]


def test_an_event_that_containerd_refuses_does_not_hold_up_the_next(containerd, publisher, caplog):
    server, events = containerd(refuse=["/bad"]), publisher()
    publish(events, [1], topic="/bad")
    publish(events, [2])
    assert events.flush(5)
    assert server.pids() == [2]
    assert "containerd refuses the event /bad" in caplog.text


def test_an_outage_is_logged_once_and_its_end_too(containerd, publisher, caplog):
    caplog.set_level(logging.INFO)
    events = publisher()
    publish(events, range(3))
    assert not events.flush(0.3)                    # several attempts
    server = containerd()
    assert events.flush(5)
    assert len(server.envelopes) == 3
    assert caplog.text.count("containerd takes no events") == 1
    assert caplog.text.count("containerd takes events again") == 1


def test_memory_is_bounded_and_what_is_given_up_is_logged(containerd, publisher, caplog):
    events = publisher(queue_max=4)
    publish(events, [0])
    assert not events.flush(0.01)                   # 0 is being sent now
    publish(events, range(1, 7))
    server = containerd()
    assert events.flush(5)
    assert server.pids() == [0, 3, 4, 5, 6]
    assert caplog.text.count("is lost") == 2


def test_events_that_are_left_at_the_end_are_named(publisher, caplog):
    events = publisher()
    publish(events, [1, 2])
    assert not events.flush(0.01)
    assert "has not taken these events" in caplog.text and "/tasks/start" in caplog.text


def test_without_an_address_events_are_only_logged(caplog):
    caplog.set_level(logging.DEBUG)
    events = Publisher("", "k8s.io")
    publish(events, [1])
    assert events.flush(0)
    events.close()
    assert "event /tasks/start" in caplog.text


def test_publishing_never_switches_greenlets(containerd, publisher):
    containerd()
    events, ran = publisher(), Event()
    green.spawn("other", ran.set)
    publish(events, range(100))
    assert not ran.is_set()
