"""One pod on the fake VMM for each module of the Task service's tests."""

import itertools

import pytest
from fake_pod import InProcess, Place

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def pod():
    """A pod whose own container runs for as long as the module."""
    place = Place()
    pod = InProcess(place)
    try:
        pod.start(pod.id, "sleep", "1000")
        yield pod
    finally:
        pod.close()
        place.remove()


@pytest.fixture
def cid(pod):
    """The id of a container to be made; removed at the end in whatever state it is."""
    container_id = f"c{next(_numbers)}"
    yield container_id
    if container_id in pod.sandbox.containers:
        if pod.status(container_id) == "paused":
            pod.call("Resume", id=container_id)
        pod.remove(container_id)
    pod.close_streams()
    pod.flush()


@pytest.fixture
def running(pod, cid):
    """A running container's id."""
    pod.start(cid, "sleep", "1000")
    return cid
