"""An OCI runtime specification (config.json as a dict) as the messages that the Kata agent takes.

The tables below follow the OCI runtime-spec's own keys on the left and katashim/ttrpc/proto/
kata_oci.proto on the right. String forms are those of Kata's Go runtime, which every agent reads:
namespaces ``mount`` and ``network``, capabilities with their ``CAP_``. Values are not judged: an
unknown rlimit or seccomp action goes through, for the agent to refuse.

The wire has no place for some of the specification (id-mapped mounts, personality, time offsets, the
unified cgroup map, scheduler, I/O priority, memory policy, ...): callers who want to know what was left
out pass a list as `lost`.

Called by the runtime layer for CreateContainer, ExecProcess and UpdateContainer.
"""

from katashim.errors import InvalidArgument
from katashim.ttrpc import proto


def to_proto(spec, lost=None):
    """A ``grpc.Spec`` from a whole config.json.

    :param spec: the parsed JSON, a dict.
    :param lost: a list; the JSON paths of what the wire cannot carry are appended.
    :raises InvalidArgument: a value of the wrong type or out of the wire's range; names its JSON path.
    """
    return _convert("grpc.Spec", spec, _SPEC, "", lost)


def process_to_proto(process, lost=None):
    """A ``grpc.Process`` from the JSON of an OCI process (an exec's spec); otherwise as :func:`to_proto`."""
    return _convert("grpc.Process", process, _PROCESS, "", lost)


def resources_to_proto(resources, lost=None):
    """A ``grpc.LinuxResources`` from the JSON of OCI Linux resources (an update); as :func:`to_proto`."""
    return _convert("grpc.LinuxResources", resources, _RESOURCES, "", lost)


# Each table: JSON key -> field, or (field, how). `how` is the table of the field's messages, or `int` for
# a list of numbers, or a function that each string goes through.

def _capability(name):
    return name if name.startswith("CAP_") else "CAP_" + name


def _namespace(name):
    return {"mnt": "mount", "net": "network"}.get(name, name)


_CAPABILITIES = {key: (key.capitalize(), _capability)
                 for key in ("bounding", "effective", "inheritable", "permitted", "ambient")}

_PROCESS = {
    "terminal": "Terminal",
    "consoleSize": ("ConsoleSize", {"height": "Height", "width": "Width"}),
    "user": ("User", {"uid": "UID", "gid": "GID", "additionalGids": ("AdditionalGids", int),
                      "username": "Username"}),
    "args": "Args",
    "env": "Env",
    "cwd": "Cwd",
    "capabilities": ("Capabilities", _CAPABILITIES),
    "rlimits": ("Rlimits", {"type": "Type", "hard": "Hard", "soft": "Soft"}),
    "noNewPrivileges": "NoNewPrivileges",
    "apparmorProfile": "ApparmorProfile",
    "oomScoreAdj": "OOMScoreAdj",
    "selinuxLabel": "SelinuxLabel",
}

_HOOK = {"path": "Path", "args": "Args", "env": "Env", "timeout": "Timeout"}

_HOOKS = {
    "prestart": ("Prestart", _HOOK),
    "createRuntime": ("CreateRuntime", _HOOK),
    "createContainer": ("CreateContainer", _HOOK),
    "startContainer": ("StartContainer", _HOOK),
    "poststart": ("Poststart", _HOOK),
    "poststop": ("Poststop", _HOOK),
}

_DEVICE_RULE = {"allow": "Allow", "type": "Type", "major": "Major", "minor": "Minor", "access": "Access"}

# A rule without a number means every number. The wire would make it device number 0, so what is absent
# goes as -1, which the agent and runc take for "every".
_EVERY_DEVICE = {"major": -1, "minor": -1}

_THROTTLE = {"major": "Major", "minor": "Minor", "rate": "Rate"}

_RESOURCES = {
    "devices": ("Devices", _DEVICE_RULE, _EVERY_DEVICE),
    "memory": ("Memory", {
        "limit": "Limit", "reservation": "Reservation", "swap": "Swap", "kernel": "Kernel",
        "kernelTCP": "KernelTCP", "swappiness": "Swappiness", "disableOOMKiller": "DisableOOMKiller"}),
    "cpu": ("CPU", {
        "shares": "Shares", "quota": "Quota", "period": "Period", "realtimeRuntime": "RealtimeRuntime",
        "realtimePeriod": "RealtimePeriod", "cpus": "Cpus", "mems": "Mems"}),
    "pids": ("Pids", {"limit": "Limit"}),
    "blockIO": ("BlockIO", {
        "weight": "Weight",
        "leafWeight": "LeafWeight",
        "weightDevice": ("WeightDevice", {"major": "Major", "minor": "Minor", "weight": "Weight",
                                          "leafWeight": "LeafWeight"}),
        "throttleReadBpsDevice": ("ThrottleReadBpsDevice", _THROTTLE),
        "throttleWriteBpsDevice": ("ThrottleWriteBpsDevice", _THROTTLE),
        "throttleReadIOPSDevice": ("ThrottleReadIOPSDevice", _THROTTLE),
        "throttleWriteIOPSDevice": ("ThrottleWriteIOPSDevice", _THROTTLE)}),
    "hugepageLimits": ("HugepageLimits", {"pageSize": "Pagesize", "limit": "Limit"}),
    "network": ("Network", {
        "classID": "ClassID",
        "priorities": ("Priorities", {"name": "Name", "priority": "Priority"})}),
}

_SECCOMP = {
    "defaultAction": "DefaultAction",
    "architectures": "Architectures",
    "flags": "Flags",
    "syscalls": ("Syscalls", {
        "names": "Names",
        "action": "Action",
        "errnoRet": "errnoret",
        "args": ("Args", {"index": "Index", "value": "Value", "valueTwo": "ValueTwo", "op": "Op"})}),
}

_ID_MAPPING = {"hostID": "HostID", "containerID": "ContainerID", "size": "Size"}

_LINUX = {
    "uidMappings": ("UIDMappings", _ID_MAPPING),
    "gidMappings": ("GIDMappings", _ID_MAPPING),
    "sysctl": "Sysctl",
    "resources": ("Resources", _RESOURCES),
    "cgroupsPath": "CgroupsPath",
    "namespaces": ("Namespaces", {"type": ("Type", _namespace), "path": "Path"}),
    "devices": ("Devices", {"path": "Path", "type": "Type", "major": "Major", "minor": "Minor",
                            "fileMode": "FileMode", "uid": "UID", "gid": "GID"}),
    "seccomp": ("Seccomp", _SECCOMP),
    "rootfsPropagation": "RootfsPropagation",
    "maskedPaths": "MaskedPaths",
    "readonlyPaths": "ReadonlyPaths",
    "mountLabel": "MountLabel",
    "intelRdt": ("IntelRdt", {"l3CacheSchema": "L3CacheSchema"}),
}

_SPEC = {
    "ociVersion": "Version",
    "process": ("Process", _PROCESS),
    "root": ("Root", {"path": "Path", "readonly": "Readonly"}),
    "hostname": "Hostname",
    "mounts": ("Mounts", {key: key for key in ("destination", "source", "type", "options")}),
    "hooks": ("Hooks", _HOOKS),
    "annotations": "Annotations",
    "linux": ("Linux", _LINUX),
}

def _convert(full_name, value, table, path, lost):
    message = proto.get(full_name)()
    _fill(message, value, table, path, lost)
    return message


def _fill(message, value, table, path, lost):
    """Put a JSON object into `message`. JSON's null is as good as absent."""
    for key, item in _expect(value, dict, path).items():
        where = f"{path}.{key}" if path else key
        entry = table.get(key)
        if item is None:
            continue
        if entry is not None:
            _set(message, item, where, lost, *((entry,) if isinstance(entry, str) else entry))
        elif lost is not None:
            lost.append(where)


def _set(message, item, path, lost, field, how=None, absent=None):
    """Put one JSON value into one field; `absent`: values of the keys that its objects lack."""
    target = getattr(message, field)
    if hasattr(target, "GetEntryClass"):
        for key, text in _expect(item, dict, path).items():
            target[_string(key, path)] = _string(text, f"{path}.{key}")
    elif isinstance(how, dict) and hasattr(target, "add"):
        for index, element in enumerate(_expect(item, list, path)):
            entry = target.add()
            _fill(entry, absent or {}, how, path, lost)
            _fill(entry, element, how, f"{path}[{index}]", lost)
    elif isinstance(how, dict):
        target.SetInParent()        # an empty object is there all the same
        _fill(target, item, how, path, lost)
    elif hasattr(target, "append"):
        for index, element in enumerate(_expect(item, list, path)):
            _append(target, element, how, f"{path}[{index}]")
    else:
        _set_scalar(message, field, target, item, how, path)


def _append(target, element, how, path):
    _guarded(target.append, _number(element, path) if how is int else _string(element, path, how), path)


def _set_scalar(message, field, present, item, how, path):
    """`present`: the field's value as it is, which shows its type."""
    if isinstance(present, bool):
        setattr(message, field, _expect(item, bool, path))
    elif isinstance(present, int):
        _guarded(lambda number: setattr(message, field, number), _number(item, path), path)
    else:
        setattr(message, field, _string(item, path, how))


def _guarded(store, value, path):
    try:
        store(value)
    except ValueError as exc:       # how protobuf says that a number does not fit the field
        raise InvalidArgument(f"{path} is {value}, which is out of range") from exc


def _number(value, path):
    if isinstance(value, bool):
        raise InvalidArgument(f"{path} should be a number, not {value!r}")
    return _expect(value, int, path)


def _string(value, path, how=None):
    _expect(value, str, path)
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise InvalidArgument(f"{path} is not valid Unicode: {value!a}") from exc
    return how(value) if how is not None else value


_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a number", bool: "true or false"}


def _expect(value, kind, path):
    if not isinstance(value, kind):
        raise InvalidArgument(f"{path or 'the specification'} should be {_JSON_NAMES[kind]}, not {value!r}")
    return value
