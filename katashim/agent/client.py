"""The client of the Kata agent in the guest: one method for each RPC of grpc.AgentService and grpc.Health.

    agent = Agent("vsock://3:1024", sandbox_id="s1")
    agent.connect(timeout_s=30)
    agent.CreateContainer(container_id="c1", OCI=oci.to_proto(spec), storages=[Storage(...)])
    status = agent.WaitProcess(container_id="c1").status

Which RPCs there are, and which fields they take, stands in katashim/ttrpc/proto/kata_agent.proto; the
runtime layer is the caller. All calls of an Agent share one connection, and may run at the same time.
The agent does not keep the order of two requests that are in flight together (ttrpc-rust runs each in
a task of its own), so whoever needs an order (WriteStdin, CopyFile) waits for each answer.
"""

import functools

import gevent

from katashim import green
from katashim.agent import dial
from katashim.errors import DEADLINE_EXCEEDED, AgentError, ConnectionClosed, DeadlineExceeded
from katashim.ttrpc import proto
from katashim.ttrpc.client import Client

SERVICE = "grpc.AgentService"
HEALTH = "grpc.Health"

REQUEST_TIMEOUT_S = 30
DIAL_TIMEOUT_S = 60
_CHECK_TIMEOUT_S = 10       # of one attempt: a vsock connection made while the guest boots may stay mute
_RETRY_S = 0.02

# These last as long as a process, or until it says or takes something.
_UNBOUNDED = frozenset(("WaitProcess", "ReadStdout", "ReadStderr", "WriteStdin", "GetOOMEvent"))
_BY_METHOD = object()


class Agent:
    """A connection to the agent of one sandbox.

    :param address: where it listens: ``vsock://CID:PORT``, ``hvsock:///path:PORT`` or ``unix:///path``.
    :param sandbox_id: for error texts.
    :param request_timeout_s: seconds that a call may take unless it says otherwise.
    :param dial_timeout_s: seconds that :meth:`connect` may take unless it says otherwise.
    :param on_call: ``on_call(service, method, seconds, code)`` after each call, for logs and metrics.

    Every RPC is a method: ``agent.StartContainer(container_id="c1")``, see :meth:`call`.
    """

    def __init__(self, address, *, sandbox_id="", request_timeout_s=REQUEST_TIMEOUT_S,
                 dial_timeout_s=DIAL_TIMEOUT_S, on_call=None):
        self.address = address
        self.request_timeout_s = request_timeout_s
        self.dial_timeout_s = dial_timeout_s
        self._name = f"the agent of sandbox {sandbox_id}" if sandbox_id else f"the agent at {address}"
        self._on_call = on_call
        self._client = None

    def connect(self, timeout_s=None, alive=None):
        """Dial until the agent answers that it serves; returns self.

        A connection that the guest takes and drops again (its agent is not there yet) is tried anew.

        :param timeout_s: seconds for all of it.
        :param alive: called between attempts; False means that the VMM has died.
        :raises DeadlineExceeded: no answer in time. :raises Unavailable: `alive` said no.
        """
        timeout_s = self.dial_timeout_s if timeout_s is None else timeout_s
        watch = green.Stopwatch(timeout_s)
        failure = None
        while watch.left():
            sock = dial.connect(self.address, watch.left(), alive)
            self._client = Client(sock, self._name, on_call=self._on_call, error_of=_agent_error)
            try:
                self.Check(timeout_s=min(_CHECK_TIMEOUT_S, watch.left(least=0.001)))
                return self
            except (ConnectionClosed, DeadlineExceeded) as exc:
                failure = exc
                self._client.close()
                gevent.sleep(min(_RETRY_S, watch.left()))
        raise DeadlineExceeded(
            f"{self._name} ({self.address}) did not answer within {timeout_s:g} s") from failure

    @property
    def closed(self):
        """An Event, set when the connection has ended; None before :meth:`connect`."""
        return None if self._client is None else self._client.closed

    def close(self):
        """Hang up. Calls that wait get ConnectionClosed."""
        if self._client is not None:
            self._client.close()

    def call(self, method, /, *, timeout_s=_BY_METHOD, **fields):
        """Call an RPC of the agent and wait for its response message.

        :param method: such as ``"CreateContainer"``; that of grpc.Health are ``Check`` and ``Version``.
        :param timeout_s: seconds, or None for ever. Else `request_timeout_s`, and for ever for the calls
            that wait for a process (WaitProcess, ReadStdout, ReadStderr, WriteStdin, GetOOMEvent).
        :param fields: the request's fields, as :func:`katashim.ttrpc.proto.build` takes them.
        :raises AgentError: the agent refused, with its code and words.
        :raises DeadlineExceeded: no answer in time. :raises ConnectionClosed: the connection is gone;
            ``maybe_executed`` tells whether the request had left.
        """
        service, info = _rpc(method)
        if self._client is None:
            raise ConnectionClosed(f"{method}: {self._name} is not connected yet")
        if timeout_s is _BY_METHOD:
            timeout_s = None if method in _UNBOUNDED else self.request_timeout_s
        request = proto.build(info.request, **fields)
        try:
            return self._client.call(service, method, request, timeout_s)
        except (DeadlineExceeded, AgentError) as exc:
            if exc.code != DEADLINE_EXCEEDED:       # the agent knows the deadline too, and may be faster
                raise
            raise DeadlineExceeded(
                f"{self._name} did not answer {_describe(method, fields)} within {timeout_s:g} s") from exc
        except ConnectionClosed as exc:
            raise ConnectionClosed(f"{_describe(method, fields)}: {exc.message}", exc.maybe_executed) from exc

    def __getattr__(self, name):
        try:
            _rpc(name)
        except KeyError:
            raise AttributeError(f"the agent has no RPC {name!r}") from None
        return functools.partial(self.call, name)


def _rpc(method):
    """``(service name, Method)`` of an RPC; :raises KeyError: the agent has none of that name."""
    info = proto.service(SERVICE).get(method)
    if info is not None:
        return SERVICE, info
    return HEALTH, proto.service(HEALTH)[method]


def _describe(method, fields):
    """"WaitProcess of container c1, exec e1", for error texts."""
    text = method
    container, process = fields.get("container_id"), fields.get("exec_id")
    if container:
        text += f" of container {container}"
    if process and process != container:
        text += f", exec {process}"
    return text


def _agent_error(code, label, text):
    return AgentError(code, label.rpartition("/")[2], text)
