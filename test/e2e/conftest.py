"""What the end-to-end tests share: the real containerd, the real VM, and a look at what is left.

Fixtures compose: `daemon` (one containerd for a module) -> `pod` (one VM in it, for tests that need no VM
of their own) -> `name` (ids that are nobody else's). After every test all that it made is removed, and
the machine is compared with what it was before.
"""

import contextlib
import itertools
import os
import shutil
import tempfile

import pytest
from direct_shim import DirectShim
from harness import leaks
from harness.containerd import Containerd
from live_pods import Pod, configuration

# In the names of all that these tests make, so that others may work on the machine at the same time.
WORD = f"e2e{os.getpid()}"
_numbers = itertools.count()


def fresh_name(role="c"):
    """An id that no other container has or had."""
    return f"{WORD}-{role}{next(_numbers)}"


@contextlib.contextmanager
def a_containerd():
    """A containerd with the busybox image, whose shims take ``config_path`` as configuration; nothing of
    it may stay."""
    running = Containerd(config=configuration())
    # The sockets' names are hashes; in a directory of our own they can be told from other people's.
    running.env["KATASHIM_SOCKET_DIR"] = os.path.join(running.directory, "s")
    before = leaks.snapshot(scope=(WORD, running.directory))
    with running:
        running.import_busybox()
        yield running
        failures = traces_in(running.log_path)
    leaks.check(before)
    assert not failures


def traces_in(log_path):
    """The records of a log that have the trace of an error that nobody foresaw."""
    with open(log_path, errors="replace") as log:
        return [line for line in log if "Traceback (most recent call last)" in line]


@pytest.fixture(scope="module")
def daemon():
    """One containerd for all tests of a module."""
    with a_containerd() as running:
        yield running


@pytest.fixture
def mortal_daemon():
    """One for a single test, which may kill and restart it."""
    with a_containerd() as running:
        yield running


@pytest.fixture(scope="module")
def pod(daemon):
    """A :class:`Pod` that lives as long as the module's containerd."""
    with Pod(daemon, fresh_name("pod")) as pod:
        yield pod


@pytest.fixture(scope="session")
def name():
    """A function that makes ids."""
    return fresh_name


@pytest.fixture
def configured(daemon):
    """``configured(boot_timeout_s=5)``: the configuration of VMs that start during this test."""
    def write(**settings):
        with open(daemon.config_path, "w") as file:
            file.write(configuration(**settings))
    yield write
    write()


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """Removes what a test made, and fails it when something stays."""
    if "daemon" not in request.fixturenames:
        yield
        return
    daemon = request.getfixturevalue("daemon")
    if "pod" in request.fixturenames:
        request.getfixturevalue("pod")          # it is there before and after
    kept = _containers(daemon)
    before = leaks.snapshot(scope=(WORD, daemon.directory), directories=daemon.traces())
    yield
    for made in sorted(_containers(daemon) - kept, key=_members_first(daemon)):
        daemon.ctr("task", "kill", "-s", "SIGKILL", "-a", made, check=False)
        daemon.ctr("task", "rm", "-f", made, check=False)
        daemon.ctr("container", "rm", made, check=False)
    leaks.check(before)


def _containers(daemon):
    return set(daemon.ctr("container", "ls", "-q").out.split())


def _members_first(daemon):
    """A sort key: a pod's sandbox goes last, with its VM."""
    def key(container):
        return os.path.isdir(f"/run/kata/{container}")
    return key


@pytest.fixture(scope="module")
def shims(tmp_path_factory):
    """``shims("x", spec)``: a :class:`DirectShim` of a fresh id, to be entered; nothing of it may stay."""
    directory = tempfile.mkdtemp(prefix="e2e-", dir="/run")
    config = os.path.join(directory, "katashim.conf")
    before = leaks.snapshot(scope=(WORD, directory), directories=[directory + "/s"])

    def make(role, spec, env=None, **settings):
        with open(config, "w") as file:
            file.write(configuration(**settings))
        environment = {**os.environ, "KATA_CONF_FILE": config, "KATASHIM_SOCKET_DIR": f"{directory}/s",
                       "KATASHIM_LOG": f"{directory}/log", "TTRPC_ADDRESS": "", **(env or {})}
        return DirectShim(directory, fresh_name(role), spec, environment)
    make.log = f"{directory}/log"
    yield make
    leaks.check(before)
    failures = traces_in(make.log)
    shutil.rmtree(directory)
    assert not failures
