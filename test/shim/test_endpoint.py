"""katashim.shim.endpoint: where the socket is, and who owns it."""

import hashlib
import os
import socket
import threading

import pytest

from katashim.errors import InvalidArgument, KatashimError
from katashim.shim import endpoint


@pytest.fixture
def path(socket_dir):
    return endpoint.socket_path(f"{socket_dir}/s", "/run/c.sock", "k8s.io", "c1")


@pytest.fixture
def listen():
    made = []

    def make(path):
        made.append(endpoint.listen(path))
        return made[-1]
    yield make
    for each in made:
        if each is not None:
            each.close()


def test_the_path_is_the_one_that_containerds_helper_computes():
    name = hashlib.sha256(b"/run/containerd/containerd.sock/k8s.io/c1").hexdigest()
    assert endpoint.socket_path("/run/containerd/s", "/run/containerd/containerd.sock", "k8s.io",
                                "c1") == "/run/containerd/s/" + name


def test_without_an_address_the_path_is_made_of_the_rest():
    name = hashlib.sha256(b"k8s.io/c1").hexdigest()
    assert endpoint.socket_path("/s/", "", "k8s.io", "c1") == "/s/" + name


def test_a_path_that_the_kernel_would_not_take_is_an_error():
    folder = "/run/" + "d" * 37
    assert len(endpoint.socket_path(folder, "a", "ns", "id")) == 107
    with pytest.raises(InvalidArgument, match="choose a shorter directory"):
        endpoint.socket_path(folder + "d", "a", "ns", "id")


def test_the_directory_comes_from_the_environment_then_containerd_then_the_default(monkeypatch):
    class Params:
        socket_dir = "/from/containerd"
    # The start path reads the environment without the os module, so it must be set where that looks.
    environ = {}
    monkeypatch.setattr("posix.environ", environ)
    assert endpoint.directory() == "/run/containerd/s"
    assert endpoint.directory(Params) == "/from/containerd"
    environ[b"KATASHIM_SOCKET_DIR"] = b"/mine"
    assert endpoint.directory(Params) == "/mine"
    environ[b"KATASHIM_SOCKET_DIR"] = b"relative"
    with pytest.raises(InvalidArgument, match="not an absolute path"):
        endpoint.directory()


def test_listening_makes_the_directory_and_a_private_socket(path, listen):
    assert not endpoint.accepts(path)
    listen(path)
    assert endpoint.accepts(path)
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_stale_socket_is_replaced(path, listen):
    listen(path).close()
    assert os.path.exists(path) and not endpoint.accepts(path)
    assert listen(path) is not None
    assert endpoint.accepts(path)


def test_a_living_one_is_left_alone(path, listen):
    listen(path)
    known = endpoint.identity(path)
    assert listen(path) is None
    assert endpoint.identity(path) == known and endpoint.accepts(path)


def test_a_full_backlog_is_somebody(tmp_path):
    path = str(tmp_path / "full")
    busy = socket.socket(socket.AF_UNIX)
    clients = []
    try:
        busy.bind(path)
        busy.listen(0)
        for _ in range(3):
            clients.append(socket.socket(socket.AF_UNIX))
            clients[-1].setblocking(False)
            try:
                clients[-1].connect(path)
            except BlockingIOError:
                break
        assert endpoint.accepts(path)
    finally:
        for each in [busy, *clients]:
            each.close()


def test_of_many_that_start_at_once_exactly_one_listens(path, listen):
    listen(path).close()                    # stale, so that all of them want to replace it
    barrier, found = threading.Barrier(8), []

    def start():
        barrier.wait()
        found.append(listen(path))
    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([each for each in found if each is not None]) == 1
    assert endpoint.accepts(path)


def test_only_the_socket_that_was_ours_is_removed(path, listen):
    listen(path).close()
    old = endpoint.identity(path)
    os.rename(path, path + ".old")          # keeps the inode, so that the next one has another
    listen(path)
    endpoint.remove(path, old)
    assert endpoint.accepts(path)
    endpoint.remove(path, endpoint.identity(path))
    assert not os.path.exists(path)
    endpoint.remove(path, old)


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KatashimError, match="cannot listen on"):
        endpoint.listen(str(tmp_path / "file" / "socket"))


def test_what_is_in_the_way_and_no_socket_is_not_removed(path):
    os.makedirs(path)
    with pytest.raises(KatashimError, match="cannot listen on"):
        endpoint.listen(path)
    assert os.path.isdir(path)
