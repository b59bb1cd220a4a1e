"""What groups of RPCs have in common. Called by services.py, pod_rpcs.py, container_rpcs.py."""

API_VERSION, AGENT_VERSION = "0.0.1", "4.1.0"       # of the protocol that we speak, and its release


class Rpcs:
    """Some RPCs on the pod: every method whose name starts with a capital is one, from request to response.

    :ivar sandbox: the sandbox.Sandbox. :ivar end: ends the agent when it is called.
    """

    def __init__(self, codec, sandbox, end):
        self._codec = codec
        self.sandbox, self.end = sandbox, end

    def table(self):
        """``{method: function}``."""
        return {name: getattr(self, name) for name in dir(self) if name[0].isupper()}

    def make(self, name, /, **fields):
        """A message of the type `name`."""
        return self._codec.type(name)(**fields)
