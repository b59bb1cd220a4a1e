"""The bundle's config.json (OCI runtime-spec 1.0 to 1.2), and what container managers write into it.

containerd's CRI plugin, CRI-O and dockershim each say in annotations whether a container is a pod's
sandbox or a member of one, and of which. Called by the runtime and by katashim.resources; the
`start` path has a lean reader of its own.
"""

import os

from katashim.errors import InvalidArgument, NotFound

POD_SANDBOX = "pod_sandbox"
POD_CONTAINER = "pod_container"
SINGLE_CONTAINER = "single_container"

_TYPE_KEYS = (
    "io.kubernetes.cri-o.ContainerType",
    "io.kubernetes.cri.container-type",
    "io.kubernetes.docker.type",
)
_TYPES = {
    "sandbox": POD_SANDBOX, "podsandbox": POD_SANDBOX, "pod_sandbox": POD_SANDBOX,
    "container": POD_CONTAINER, "pod_container": POD_CONTAINER,
    "single_container": SINGLE_CONTAINER,
}
_SANDBOX_ID_KEYS = (
    "io.kubernetes.cri-o.SandboxID",
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.sandbox.id",
)

_MAX_SPEC_BYTES = 16 * 1024 * 1024


def load_spec(bundle):
    """Read and check `bundle`/config.json; returns it as a dict.

    :raises NotFound: the bundle or the file is missing.
    :raises InvalidArgument: it cannot be read, is not JSON, or lacks what every Linux container has.
    """
    import json  # not at the top: the start path may read this module's tables
    path = os.path.join(bundle, "config.json")
    try:
        with open(path, "rb") as config:
            text = config.read(_MAX_SPEC_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"no OCI spec at {path}") from None
    except OSError as exc:
        raise InvalidArgument(f"cannot read {path}: {exc.strerror}") from exc
    if len(text) > _MAX_SPEC_BYTES:
        raise InvalidArgument(f"{path} is larger than {_MAX_SPEC_BYTES >> 20} MiB")
    try:
        spec = json.loads(text)
    except ValueError as exc:
        raise InvalidArgument(f"{path} is not JSON: {exc}") from exc
    except RecursionError:
        raise InvalidArgument(f"{path} is nested too deeply") from None
    check_spec(spec, path)
    return spec


def check_spec(spec, where="the OCI spec"):
    """Check the parts of a spec that katashim relies on.

    :raises InvalidArgument: names the part and `where` it was.
    """
    if not isinstance(spec, dict):
        raise InvalidArgument(f"{where} is not a JSON object")
    for part in ("process", "root", "linux"):
        _expect(spec.get(part), dict, part, where)
    for part, kind in (("mounts", list), ("annotations", dict), ("hooks", dict)):
        _expect(spec.get(part), kind, part, where, optional=True)
    args = _expect(spec["process"].get("args"), list, "process.args", where)
    if not args or not all(isinstance(word, str) for word in args):
        raise InvalidArgument(f"{where}: process.args names no program")
    resources = _expect(spec["linux"].get("resources"), dict, "linux.resources", where, optional=True) or {}
    for part in ("cpu", "memory"):
        _expect(resources.get(part), dict, f"linux.resources.{part}", where, optional=True)
    for index, entry in enumerate(spec.get("mounts") or ()):
        _expect(entry, dict, f"mounts[{index}]", where)
        destination = entry.get("destination")
        if not isinstance(destination, str) or not destination:
            raise InvalidArgument(f"{where}: mounts[{index}] has no destination")
    for index, entry in enumerate(spec["linux"].get("namespaces") or ()):
        _expect(entry, dict, f"linux.namespaces[{index}]", where)
        _expect(entry.get("type"), str, f"linux.namespaces[{index}].type", where)


def _expect(value, kind, part, where, optional=False):
    if value is None and optional:
        return value
    if value is None:
        raise InvalidArgument(f"{where} has no {part!r}")
    if not isinstance(value, kind):
        raise InvalidArgument(f"{where}: {part!r} is not of the kind that the OCI runtime-spec says")
    return value


def annotations(spec):
    """The annotations of a spec, a dict, also where it has none."""
    return spec.get("annotations") or {}


def container_type(spec):
    """POD_SANDBOX, POD_CONTAINER, or SINGLE_CONTAINER where no manager left a mark."""
    found = annotations(spec)
    for key in _TYPE_KEYS:
        if found.get(key) in _TYPES:
            return _TYPES[found[key]]
    return SINGLE_CONTAINER


def sandbox_id(spec, container_id):
    """The id of the sandbox that the container `container_id` belongs to: its own, unless it is a pod's member.

    :raises InvalidArgument: it is marked as a member of a pod, but not of which.
    """
    if container_type(spec) != POD_CONTAINER:
        return container_id
    found = annotations(spec)
    for key in _SANDBOX_ID_KEYS:
        if found.get(key):
            return found[key]
    raise InvalidArgument(f"container {container_id} is marked as a member of a pod, but none of the "
                          f"annotations {', '.join(_SANDBOX_ID_KEYS)} says of which")


def namespace_path(spec, kind):
    """The path of the namespace of `kind` ("network", "pid", ...) that the container joins; "" when it
    gets a new one, None when the spec has none of that kind (it shares the host's)."""
    for entry in spec["linux"].get("namespaces") or ():
        if entry.get("type") == kind:
            return entry.get("path") or ""
    return None
