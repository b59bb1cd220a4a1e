"""The RPCs: all that upstream's agent answers, put together into the tables that server.py looks in.

    pod_rpcs            the sandbox, the network, the guest itself
    container_rpcs      containers, processes, their stdio

Those upstream implements and this agent does not are absent from the tables and are answered as upstream's
agent answers for a feature that it was built without. Called by main.py.
"""

from katashim.guest.agent.container_rpcs import ContainerRpcs, ProcessRpcs
from katashim.guest.agent.pod_rpcs import GuestRpcs, NetworkRpcs, PodRpcs
from katashim.guest.agent.rpcs import AGENT_VERSION, API_VERSION, Rpcs
from katashim.guest.agent.sandbox import Sandbox

_SERVING = 1


def handlers(codec, settings, end):
    """``{service: {method: function}}`` for server.Server.

    :param codec: the wire.Codec for responses. :param end: called to end the agent.
    """
    sandbox = Sandbox(settings)
    agent = {}
    for group in (PodRpcs, GuestRpcs, NetworkRpcs, ContainerRpcs, ProcessRpcs):
        agent.update(group(codec, sandbox, end).table())
    return {"grpc.AgentService": agent, "grpc.Health": _HealthRpcs(codec, sandbox, end).table()}


class _HealthRpcs(Rpcs):
    def Check(self, request):
        return self.make("grpc.HealthCheckResponse", status=_SERVING)

    def Version(self, request):
        return self.make("grpc.VersionCheckResponse", grpc_version=API_VERSION, agent_version=AGENT_VERSION)
