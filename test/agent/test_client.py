import gevent
import pytest
from gevent.event import Event
from gevent.socket import AF_UNIX, socket

from katashim import errors
from katashim.agent.client import Agent
from katashim.agent.types import Storage
from katashim.ttrpc import proto
from katashim.ttrpc.server import Server

TIMEOUT_S = 5
ServingResponse = proto.get("grpc.HealthCheckResponse")


class Guest:
    """An agent's AgentService and Health, as far as these tests call them."""

    def __init__(self, path):
        self.seen, self.waiting, self.release = [], Event(), Event()
        self.listener = socket(AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.server = None

    def serve(self):
        self.server = Server(self.listener, {"grpc.AgentService": self, "grpc.Health": self}, name="the host")
        self.server.start()

    def stop(self):
        if self.server is not None:
            self.server.stop()
        else:
            self.listener.close()

    def Check(self, request, context):
        self.seen.append(context)
        return ServingResponse(status=ServingResponse.SERVING)

    def Version(self, request, context):
        return proto.get("grpc.VersionCheckResponse")(grpc_version="0.0.1", agent_version="4.1.0")

    def CreateContainer(self, request, context):
        self.seen.append((request, context))

    def WaitProcess(self, request, context):
        self.seen.append((request, context))
        self.waiting.set()
        self.release.wait()
        return proto.get("grpc.WaitProcessResponse")(status=137)

    def StartContainer(self, request, context):
        error = errors.InvalidArgument('"invalid container id"\n\nStack backtrace:\n   0: <unknown>')
        error.code = errors.NOT_FOUND
        raise error

    def StatsContainer(self, request, context):
        self.waiting.set()
        self.release.wait()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "agent.sock")


@pytest.fixture
def guest(path):
    guest = Guest(path)
    yield guest
    guest.stop()


@pytest.fixture
def agent(guest, path):
    guest.serve()
    agent = Agent(f"unix://{path}", sandbox_id="s1", request_timeout_s=20)
    agent.connect(TIMEOUT_S)
    yield agent
    agent.close()


def test_connecting_asks_whether_it_serves(agent, guest):
    [context] = guest.seen
    assert (context.service, context.method) == ("grpc.Health", "Check")
    assert not agent.closed.is_set()
    assert agent.Version().agent_version == "4.1.0"


def test_an_rpc_is_a_method_that_takes_plain_values(agent, guest):
    agent.CreateContainer(container_id="c1", OCI={"Hostname": "h"}, sandbox_pidns=None,
                          storages=[Storage("blk", "/dev/vda", "ext4")])
    request, context = guest.seen[-1]
    assert request.container_id == "c1" and request.OCI.Hostname == "h"
    assert request.storages[0].fstype == "ext4"
    assert 15 < context.time_left() <= 20


def test_waiting_for_a_process_has_no_limit_unless_asked(agent, guest):
    guest.release.set()
    assert agent.WaitProcess(container_id="c1", exec_id="e1").status == 137
    assert guest.seen[-1][1].deadline is None
    agent.WaitProcess(container_id="c1", timeout_s=3)
    assert guest.seen[-1][1].time_left() <= 3
    agent.call("CreateContainer", timeout_s=None, container_id="c1")
    assert guest.seen[-1][1].deadline is None


def test_calls_run_side_by_side(agent, guest):
    waiter = gevent.spawn(agent.WaitProcess, container_id="c1")
    assert guest.waiting.wait(TIMEOUT_S)
    agent.CreateContainer(container_id="c2")
    guest.release.set()
    assert waiter.get(timeout=TIMEOUT_S).status == 137


def test_what_the_agent_does_not_have(agent):
    with pytest.raises(AttributeError, match="the agent has no RPC 'MakeCoffee'"):
        agent.MakeCoffee  # noqa: B018
    assert not hasattr(agent, "startContainer")
    with pytest.raises(ValueError, match="has no field 'id'"):
        agent.StartContainer(id="c1")


def test_a_refusal_has_the_agents_code_and_words(agent):
    with pytest.raises(errors.AgentError) as raised:
        agent.StartContainer(container_id="c1")
    error = raised.value
    assert (error.code, error.method) == (errors.NOT_FOUND, "StartContainer")
    assert error.message == 'the guest\'s agent refused StartContainer: "invalid container id"'
    assert "0: <unknown>" in error.full_text()


def test_an_rpc_that_this_agent_lacks(agent):
    with pytest.raises(errors.AgentError) as raised:
        agent.SetPolicy(policy="package agent_policy")
    assert raised.value.code == errors.UNIMPLEMENTED


def test_a_deadline_names_the_rpc_and_the_container(agent):
    with pytest.raises(errors.DeadlineExceeded) as raised:
        agent.StatsContainer(container_id="c1", timeout_s=0.02)
    assert raised.value.message == \
        "the agent of sandbox s1 did not answer StatsContainer of container c1 within 0.02 s"


def test_the_end_of_the_connection_names_them_too(agent, guest):
    waiter = gevent.spawn(agent.WaitProcess, container_id="c1", exec_id="e1")
    assert guest.waiting.wait(TIMEOUT_S)
    guest.server.stop()
    with pytest.raises(errors.ConnectionClosed) as raised:
        waiter.get(timeout=TIMEOUT_S)
    assert raised.value.message.startswith("WaitProcess of container c1, exec e1: ")
    assert "the connection to the agent of sandbox s1 is gone" in raised.value.message
    assert raised.value.maybe_executed
    assert agent.closed.is_set()
    with pytest.raises(errors.ConnectionClosed) as raised:
        agent.StartContainer(container_id="c1")
    assert not raised.value.maybe_executed


def test_calls_are_reported(guest, path):
    guest.serve()
    calls = []
    agent = Agent(f"unix://{path}", on_call=lambda *call: calls.append(call))
    agent.connect(TIMEOUT_S)
    with pytest.raises(errors.AgentError):
        agent.StartContainer(container_id="c1")
    assert [(service, method, code) for service, method, _, code in calls] == [
        ("grpc.Health", "Check", errors.OK), ("grpc.AgentService", "StartContainer", errors.NOT_FOUND)]
    agent.close()


def test_two_agents_for_one_guest(agent, path):
    other = Agent(f"unix://{path}").connect(TIMEOUT_S)
    agent.close()
    assert other.Version().grpc_version == "0.0.1"
    other.close()


def test_before_connecting():
    agent = Agent("unix:///nowhere")
    agent.close()
    assert agent.closed is None
    with pytest.raises(errors.ConnectionClosed, match="not connected yet"):
        agent.GetMetrics()


def test_a_guest_that_drops_the_first_connections(guest, path):
    """A vsock backend accepts for a guest whose agent does not listen yet."""
    def drop_two_then_serve():
        for _ in range(2):
            guest.listener.accept()[0].close()
        guest.serve()

    booting = gevent.spawn(drop_two_then_serve)
    agent = Agent(f"unix://{path}").connect(TIMEOUT_S)
    booting.get(timeout=TIMEOUT_S)
    assert agent.Version()
    agent.close()


def test_a_guest_that_never_answers(guest, path):
    """The kernel takes the connection, nobody accepts it."""
    with pytest.raises(errors.DeadlineExceeded) as raised:
        Agent(f"unix://{path}", sandbox_id="s1").connect(0.05)
    assert raised.value.message == f"the agent of sandbox s1 (unix://{path}) did not answer within 0.05 s"
    assert isinstance(raised.value.__cause__, errors.DeadlineExceeded)


def test_a_virtual_machine_that_dies_meanwhile(guest, path):
    lives = iter([True, False])
    accepting = gevent.spawn(lambda: guest.listener.accept()[0].close())
    with pytest.raises(errors.Unavailable, match="the virtual machine is gone"):
        Agent(f"unix://{path}").connect(TIMEOUT_S, alive=lambda: next(lives))
    accepting.get(timeout=TIMEOUT_S)
