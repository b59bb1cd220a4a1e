"""Pods on the fake VMM, for the tests of the runtime."""

import pytest
from fake_pod import Daemon, InProcess, Place


@pytest.fixture
def pods():
    """``pods(faults="...", boot_timeout_s=..)``: an :class:`InProcess` of its own, ended whatever happens."""
    made = []

    def make(faults="", kind=InProcess, **settings):
        place = Place(**settings)
        made.append((place, None))
        made[-1] = (place, kind(place, faults))
        return made[-1][1]
    yield make
    for place, pod in reversed(made):
        try:
            if pod is not None:
                pod.close()
        finally:
            place.remove()


@pytest.fixture
def daemons(pods):
    """The same with the real daemon."""
    return lambda faults="", **settings: pods(faults, Daemon, **settings)
