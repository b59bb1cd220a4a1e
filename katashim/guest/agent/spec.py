"""The host's container spec, from the wire's messages to the runtime spec that crun reads, amended.

The messages (kata_oci.proto) cannot tell absent from zero, so a zero limit means none. Two dialects
come in: runtime-rs names namespaces ``mnt`` and ``net`` and capabilities without ``CAP_``, Go's runtime
as the runtime spec does; both are understood. What the guest must do otherwise than the spec says is
done here, in :func:`amend`; docs/guest.md lists it. Called by container.py.
"""

from katashim.guest.agent.rpcerror import INTERNAL, INVALID_ARGUMENT, RpcError

OCI_VERSION = "1.0.2"           # crun 1.8 refuses newer numbers; what we pass is in 1.0.2
_NAMESPACES = {"mnt": "mount", "net": "network"}
_CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
_IPC_SYSCTLS = ("kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem")
CONTAINER_TYPE = "io.katacontainers.pkg.oci.container_type"


def to_oci(spec):
    """A ``grpc.Spec`` as the dict that config.json holds, in the guest's words but not amended yet.

    :raises RpcError: it lacks what every container has.
    """
    if spec.Process is None or spec.Root is None or spec.Linux is None:
        raise RpcError(INVALID_ARGUMENT, "the OCI spec lacks process, root or linux")
    oci = {
        "ociVersion": OCI_VERSION,
        "process": process(spec.Process),
        "root": {"path": spec.Root.Path, "readonly": spec.Root.Readonly},
        "hostname": spec.Hostname,
        "mounts": [{"destination": mount.destination, "source": mount.source, "type": mount.type,
                    "options": list(mount.options)} for mount in spec.Mounts],
        "annotations": dict(spec.Annotations),
        "linux": _linux(spec.Linux),
    }
    if spec.Hooks is not None and spec.Hooks.StartContainer:
        # The others ran on the host, or would look for host paths.
        oci["hooks"] = {"startContainer": [_hook(hook) for hook in spec.Hooks.StartContainer]}
    return oci


def process(message):
    """A ``grpc.Process`` as the runtime spec's process."""
    user = message.User
    oci = {
        "terminal": message.Terminal,
        "user": {"uid": 0, "gid": 0} if user is None else {
            "uid": user.UID, "gid": user.GID, "additionalGids": list(user.AdditionalGids)},
        "args": list(message.Args), "env": list(message.Env), "cwd": message.Cwd or "/",
        "noNewPrivileges": message.NoNewPrivileges, "oomScoreAdj": message.OOMScoreAdj,
        "rlimits": [{"type": limit.Type if limit.Type.startswith("RLIMIT_") else f"RLIMIT_{limit.Type}",
                     "hard": limit.Hard, "soft": limit.Soft} for limit in message.Rlimits],
    }
    if message.ConsoleSize is not None:
        oci["consoleSize"] = {"height": message.ConsoleSize.Height, "width": message.ConsoleSize.Width}
    if message.Capabilities is not None:
        oci["capabilities"] = {name: [capability(item)
                                      for item in getattr(message.Capabilities, name.capitalize())]
                               for name in _CAPABILITY_SETS}
    return oci


def capability(name):
    """A capability in the runtime spec's spelling: ``CHOWN`` and ``"CAP_CHOWN"`` (quoted) are CAP_CHOWN."""
    name = name.strip('"').upper()
    return name if name.startswith("CAP_") else f"CAP_{name}"


def resources(message):
    """A ``grpc.LinuxResources`` as the runtime spec's resources, without limits that are not above zero."""
    oci = {}
    if message.Devices:
        oci["devices"] = [_device_rule(rule) for rule in message.Devices]
    if message.Memory is not None:
        oci["memory"] = _above_zero(message.Memory, limit="Limit", reservation="Reservation", swap="Swap",
                                    kernel="Kernel", kernelTCP="KernelTCP", swappiness="Swappiness")
        if message.Memory.DisableOOMKiller:
            oci["memory"]["disableOOMKiller"] = True
    if message.CPU is not None:
        oci["cpu"] = _above_zero(message.CPU, shares="Shares", quota="Quota", period="Period",
                                 realtimeRuntime="RealtimeRuntime", realtimePeriod="RealtimePeriod")
        sets = {"cpus": message.CPU.Cpus, "mems": message.CPU.Mems}
        oci["cpu"].update({name: value for name, value in sets.items() if value})
    if message.Pids is not None and message.Pids.Limit > 0:
        oci["pids"] = {"limit": message.Pids.Limit}
    if message.BlockIO is not None:
        oci["blockIO"] = _block_io(message.BlockIO)
    if message.HugepageLimits:
        oci["hugepageLimits"] = [{"pageSize": item.Pagesize, "limit": item.Limit}
                                 for item in message.HugepageLimits]
    if message.Network is not None:
        oci["network"] = {"classID": message.Network.ClassID,
                          "priorities": [{"name": item.Name, "priority": item.Priority}
                                         for item in message.Network.Priorities]}
    return oci


def amend(oci, *, cid, rootfs, sandbox, pid_namespace, unified_cgroups):
    """Make `oci` fit the guest, in place.

    :param cid: container id. :param rootfs: where its root is bound.
    :param sandbox: has ``namespace_path(kind)`` for ipc and uts, or "" for a namespace of its own.
    :param pid_namespace: path of the pid namespace to join, "" for a new one.
    :param unified_cgroups: whether the guest has cgroup v2.
    :raises RpcError: the spec cannot work in a guest.
    """
    linux = oci["linux"]
    oci["root"]["path"] = rootfs
    linux["cgroupsPath"] = cgroups_path(linux.get("cgroupsPath", ""), cid)
    if not linux["namespaces"]:
        raise RpcError(INTERNAL, "cannot find the pid ns")
    kinds = {"pid": pid_namespace, "ipc": sandbox.namespace_path("ipc"), "uts": sandbox.namespace_path("uts")}
    namespaces = []
    for namespace in linux["namespaces"]:
        kind = namespace["type"]
        if kind in ("ipc", "uts"):
            namespaces.append({"type": kind, "path": kinds[kind]} if kinds[kind] else {"type": kind})
        elif kind not in ("pid", "network"):     # containers share the guest's network
            namespaces.append(namespace)
    namespaces.append({"type": "pid", "path": pid_namespace} if pid_namespace else {"type": "pid"})
    if unified_cgroups and not any(namespace["type"] == "cgroup" for namespace in namespaces):
        namespaces.append({"type": "cgroup"})
    linux["namespaces"] = namespaces
    present = {namespace["type"] for namespace in namespaces}
    linux["sysctl"] = _apply_sysctls(linux.get("sysctl", {}), present)
    if "uts" not in present:
        oci["hostname"] = ""
    if not oci["hostname"]:
        del oci["hostname"]


def cgroups_path(path, cid):
    """The cgroup of a container below the guest's root: ``slice:prefix:name`` becomes directories."""
    if not path:
        return f"/{cid}"
    if ":" in path:
        path = path.replace(":", "/")
    return "/" + "/".join(part for part in path.split("/") if part not in ("", ".", ".."))


def _linux(message):
    oci = {
        "namespaces": [_namespace(namespace) for namespace in message.Namespaces],
        "cgroupsPath": message.CgroupsPath,
        "maskedPaths": list(message.MaskedPaths), "readonlyPaths": list(message.ReadonlyPaths),
        "devices": [_device(device) for device in message.Devices],
        "sysctl": dict(message.Sysctl),
        "resources": resources(message.Resources) if message.Resources is not None else {},
    }
    for name, mappings in (("uidMappings", message.UIDMappings), ("gidMappings", message.GIDMappings)):
        if mappings:
            oci[name] = [{"hostID": item.HostID, "containerID": item.ContainerID, "size": item.Size}
                         for item in mappings]
    if message.RootfsPropagation:
        oci["rootfsPropagation"] = message.RootfsPropagation
    if message.Seccomp is not None:
        oci["seccomp"] = _seccomp(message.Seccomp)
    return oci


def _namespace(message):
    oci = {"type": _NAMESPACES.get(message.Type, message.Type)}
    if message.Path:
        oci["path"] = message.Path
    return oci


def _device(message):
    return {"path": message.Path, "type": message.Type or "c", "major": message.Major, "minor": message.Minor,
            "fileMode": message.FileMode or 0o666, "uid": message.UID, "gid": message.GID}


def _device_rule(rule):
    oci = {"allow": rule.Allow, "type": rule.Type or "a", "access": rule.Access or "rwm"}
    # The wire has no absent number: a rule for all devices says 0 or -1 for both.
    wild = oci["type"] == "a"
    for name, number in (("major", rule.Major), ("minor", rule.Minor)):
        if number > 0 or number == 0 and not wild:
            oci[name] = number
    return oci


def _block_io(message):
    oci = _above_zero(message, weight="Weight", leafWeight="LeafWeight")
    if message.WeightDevice:
        oci["weightDevice"] = [{"major": item.Major, "minor": item.Minor,
                                **_above_zero(item, weight="Weight", leafWeight="LeafWeight")}
                               for item in message.WeightDevice]
    for name in ("ThrottleReadBps", "ThrottleWriteBps", "ThrottleReadIOPS", "ThrottleWriteIOPS"):
        limits = getattr(message, name)
        if limits:
            oci[f"{name[0].lower()}{name[1:]}Device"] = [
                {"major": item.Major, "minor": item.Minor, "rate": item.Rate} for item in limits]
    return oci


def _above_zero(message, **names):
    return {ours: getattr(message, theirs) for ours, theirs in names.items() if getattr(message, theirs) > 0}


def _hook(message):
    oci = {"path": message.Path, "args": list(message.Args), "env": list(message.Env)}
    if message.Timeout > 0:
        oci["timeout"] = message.Timeout
    return oci


def _seccomp(message):
    oci = {"defaultAction": message.DefaultAction, "architectures": list(message.Architectures),
           "syscalls": []}
    if message.Flags:
        oci["flags"] = list(message.Flags)
    for call in message.Syscalls:
        rule = {"names": list(call.Names), "action": call.Action}
        if call.errnoret is not None:
            rule["errnoRet"] = call.errnoret
        if call.Args:
            rule["args"] = [{"index": item.Index, "value": item.Value, "valueTwo": item.ValueTwo,
                             "op": item.Op}
                            for item in call.Args]
        oci["syscalls"].append(rule)
    return oci


def _apply_sysctls(sysctls, namespaces):
    """Write network sysctls into the guest, the pod's network namespace; returns those left for crun.

    :raises RpcError: one that belongs to no namespace of the container.
    """
    left = {}
    for name, value in sysctls.items():
        if name.startswith("net."):
            with open(f"/proc/sys/{name.replace('.', '/')}", "w") as file:
                file.write(value)
            continue
        ours = name in _IPC_SYSCTLS or name.startswith(("kernel.shm", "fs.mqueue."))
        if not (ours and "ipc" in namespaces or name == "kernel.domainname" and "uts" in namespaces):
            raise RpcError(INTERNAL, f"Sysctl config contains invalid settings: {name}")
        left[name] = value
    return left


