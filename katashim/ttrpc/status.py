"""ttRPC's Response and Request envelopes, and the way between an exception and a google.rpc.Status.

Called by the server (exception to status) and the client (status to exception).
"""

from katashim import errors
from katashim.ttrpc import proto

Request = proto.get("ttrpc.Request")
Response = proto.get("ttrpc.Response")
_KeyValue = proto.get("ttrpc.KeyValue")
_Status = proto.get("google.rpc.Status")

_INT64_MAX = (1 << 63) - 1
_TEXT_LIMIT = 64 << 10          # characters of an error text; the wire's limit is 4 MiB for all

_CLASSES = {cls.code: cls for cls in (
    errors.NotFound, errors.AlreadyExists, errors.InvalidArgument, errors.FailedPrecondition,
    errors.Unsupported, errors.Unavailable, errors.DeadlineExceeded, errors.ResourceExhausted,
    errors.Cancelled, errors.Internal)}


def encode_request(service, method, payload, timeout_s=None, metadata=None):
    """A Request as bytes.

    :param payload: the serialized request message.
    :param timeout_s: seconds that the caller will wait, or None.
    :param metadata: ``{key: value or list of values}``, or None.
    """
    request = Request(service=service, method=method, payload=payload)
    if timeout_s is not None:
        request.timeout_nano = min(max(1, int(timeout_s * 1e9)), _INT64_MAX)    # 0 would mean no limit
    for key, values in (metadata or {}).items():
        for value in [values] if isinstance(values, str) else values:
            request.metadata.append(_KeyValue(key=key.lower(), value=value))
    return request.SerializeToString()


def metadata_of(request):
    """The metadata of a Request: ``{lower-case key: [values]}``. Go lowers keys on their way out only."""
    metadata = {}
    for pair in request.metadata:
        metadata.setdefault(pair.key.lower(), []).append(pair.value)
    return metadata


def encode_response(payload):
    """A successful Response as bytes; status is left out, as Go does (both read either)."""
    return Response(payload=payload).SerializeToString()


def encode_error(code, text):
    """A Response that carries an error, as bytes. Any text will do: what UTF-8 cannot hold is replaced."""
    if len(text) > _TEXT_LIMIT:
        text = text[:_TEXT_LIMIT] + " ..."
    clean = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return Response(status=_Status(code=code, message=clean)).SerializeToString()


def error_of(code, method, text):
    """The exception that an error status stands for; it names the RPC.

    :param code: gRPC code, not 0.
    :param method: the RPC, such as ``grpc.AgentService/WaitProcess``.
    :param text: the server's words.
    """
    cls = _CLASSES.get(code, errors.KatashimError)
    error = cls(f"{method}: {text or 'no reason given'}")
    error.code = code
    return error
