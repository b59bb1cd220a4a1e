"""What containerd tells of tasks, in the order in which it tells it: ``ctr events``."""

import json
import queue
import subprocess
import threading
import time
from typing import NamedTuple

_WAIT_S = 30
_QUIET_S = 0.5          # for an event that must not come


class Event(NamedTuple):
    topic: str
    fields: dict

    def of(self, container):
        return self.fields.get("container_id") == container


class Listener:
    """``ctr events`` in the background, for the time of a ``with`` block."""

    def __init__(self, daemon):
        self._daemon = daemon
        self._lines = queue.SimpleQueue()
        self.seen = []

    def __enter__(self):
        self._process = subprocess.Popen(self._daemon.ctr_argv("events"), env=self._daemon.env, text=True,
                                         stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._await_subscription()
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait(10)
        self._reader.join()
        self._process.stdout.close()

    def _read(self):
        for line in self._process.stdout:
            self._lines.put(line)

    def _await_subscription(self):
        """Make events of no consequence until one is seen."""
        end = time.monotonic() + _WAIT_S
        while self._lines.empty():
            assert time.monotonic() < end, "ctr events shows nothing"
            self._daemon.ctr("namespace", "label", "default", "listening=yes")

    def until(self, topic, container):
        """All events of `container` so far, read until `topic`; [(topic without /tasks/, fields)]."""
        end = time.monotonic() + _WAIT_S
        while not any(event.topic == topic and event.of(container) for event in self.seen):
            self._take(end - time.monotonic())
        return self.of(container)

    def settle(self, container):
        """All events of `container`, once none has come for a while."""
        try:
            while True:
                self._take(_QUIET_S)
        except queue.Empty:
            return self.of(container)

    def of(self, container):
        return [event for event in self.seen if event.of(container)]

    def _take(self, timeout_s):
        line = self._lines.get(timeout=max(0, timeout_s))
        topic, text = line.split(" ", 6)[5:]            # behind four words of time, and the namespace
        if topic.startswith("/tasks/"):
            self.seen.append(Event(topic.removeprefix("/tasks/"), json.loads(text)))


def topics(found):
    """The topics of events, without /tasks/."""
    return [event.topic for event in found]
