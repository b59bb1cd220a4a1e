"""An agent for the tests of this directory: on this machine, once for all of them."""

import os

import pytest
from agent_pods import Pod, make_root
from host_agent import HostAgent
from plain_client import PlainClient


@pytest.fixture(scope="session")
def host_agent(tmp_path_factory):
    """A running agent whose pod is set up."""
    if os.geteuid() != 0:
        pytest.skip("containers need root")
    agent = HostAgent(str(tmp_path_factory.mktemp("agent")), "agent.hotplug_timeout=1")
    try:
        agent.wait_ready(PlainClient(agent.socket, service="grpc.Health"))
        PlainClient(agent.socket).call("CreateSandbox", hostname="pod", sandbox_id="the-pod", storages=[
            {"driver": "ephemeral", "source": "shm", "fstype": "tmpfs",
             "mount_point": "/run/kata-containers/sandbox/shm",
             "options": ["nodev", "mode=1777", "size=1048576"]}])
        yield agent
    finally:
        agent.stop()
        _remove_cgroups("/sys/fs/cgroup/unified/katashim-test", "/sys/fs/cgroup/katashim-test")


@pytest.fixture
def client(host_agent):
    """A PlainClient of the agent."""
    return PlainClient(host_agent.socket)


@pytest.fixture(scope="session")
def busybox_root(tmp_path_factory):
    """Path of a root filesystem."""
    return make_root(str(tmp_path_factory.mktemp("root") / "fs"))


@pytest.fixture
def pod(client, busybox_root):
    """A pods.Pod whose containers are gone after the test."""
    made = Pod(client, busybox_root)
    yield made
    made.remove_all()


def _remove_cgroups(*paths):
    for path in paths:
        for base, _, _ in os.walk(path, topdown=False):
            os.rmdir(base)
