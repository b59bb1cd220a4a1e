"""Which sandbox a container belongs to, by the annotations in its bundle's config.json.

CRI runtimes mark the first container of a pod as its sandbox and the others with the sandbox's id;
all of them share one shim and one VM. Keys: containerd's CRI plugin, CRI-O, dockershim, in Kata's
order. Part of the start path: only C builtins are imported.
"""

from katashim.errors import InvalidArgument
from katashim.shim.flags import check_id

_TYPE_KEYS = ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri.container-type",
              "io.kubernetes.docker.type")
_ID_KEYS = ("io.kubernetes.cri-o.SandboxID", "io.kubernetes.cri.sandbox-id", "io.kubernetes.sandbox.id")
_SANDBOX = ("sandbox", "podsandbox", "pod_sandbox")
_MEMBER = ("container", "pod_container")
_SINGLE = ("single_container",)


class _Scanner:
    """What ``json.JSONDecoder`` sets on itself for the C scanner; importing json takes as long as
    the rest of the start path."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float = parse_constant = float
    parse_int = int

    def __init__(self):
        self.memo = {}


def annotations(bundle):
    """The annotations in ``<bundle>/config.json``: {str: str}, empty where there is no such file
    (the Sandbox API starts shims on bundles without one).

    :raises InvalidArgument: the file is unreadable or is not a JSON object.
    """
    path = f"{bundle}/config.json"
    try:
        with open(path, "rb") as file:
            text = file.read().decode().strip()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidArgument(f"cannot read {path}: {exc}") from exc
    spec = _parse(text, path)
    found = spec.get("annotations") if type(spec) is dict else None
    if type(spec) is not dict or type(found) not in (dict, type(None)):
        raise InvalidArgument(f"{path} is not an OCI runtime specification")
    return found or {}


def _parse(text, path):
    """The JSON value in `text`. Only an error costs the import of json, which words it well."""
    from _json import make_scanner
    try:
        value, end = make_scanner(_Scanner())(text, 0)
        if end == len(text):
            return value
    except (ValueError, StopIteration, RecursionError, SystemError):
        pass            # SystemError: the C code has looked for json's exception where nobody imported it
    import json
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidArgument(f"{path} is not JSON: {exc}") from exc


def sandbox_of(container_id, marks):
    """The id of the sandbox that the container `container_id` with annotations `marks` belongs to.

    It is the container's own for a pod's sandbox container and for a container without a pod.
    :raises InvalidArgument: a pod's container whose sandbox is not named, or named badly.
    """
    kind = next((marks[key] for key in _TYPE_KEYS if marks.get(key) in _SANDBOX + _MEMBER + _SINGLE), "")
    if kind not in _MEMBER:
        return container_id
    for key in _ID_KEYS:
        if marks.get(key):
            return check_id(marks[key], "sandbox id")
    raise InvalidArgument(f"container {container_id} is marked as {kind!r} of a pod, but none of "
                          f"{', '.join(_ID_KEYS)} names the sandbox")
