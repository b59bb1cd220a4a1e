"""The OCI spec as the guest's agent gets it.

The guest has a kernel of its own: the host's namespaces, cgroup controllers, devices and hooks mean
nothing there, and its network namespace is the whole guest. What is dropped and kept follows Kata's
runtime-rs (its ``amend_spec``); where this differs a comment says so. Pure functions on dicts, called by
katashim.runtime.container.
"""

import copy

from katashim import oci

TYPE_ANNOTATION = "io.katacontainers.pkg.oci.container_type"
BUNDLE_ANNOTATION = "io.katacontainers.pkg.oci.bundle_path"
INITDATA_ANNOTATION = "io.katacontainers.config.hypervisor.cc_init_data"

# The agent makes the pid namespace itself; containers share the guest's network and clock.
_NOT_IN_GUEST = frozenset(("pid", "network", "time"))

# Limits that the host's cgroup enforces, or that name the host's devices and page sizes. (runtime-rs
# leaves hugepageLimits; a page size that the guest lacks makes its runtime refuse the container.)
_HOST_RESOURCES = ("devices", "pids", "blockIO", "network", "hugepageLimits", "rdma")


def amend(spec, *, container_type, bundle, mounts, guest_rootfs, runtime_config, guest_selinux=False):
    """The spec to send for a container; `spec` itself stays as it is.

    :param container_type: one of katashim.oci's constants.
    :param bundle: absolute path of the bundle.
    :param mounts: the OCI mounts (dicts) that take the place of the spec's: ``Volumes.mounts``.
    :param guest_rootfs: where the root filesystem is in the guest.
    :param runtime_config: its ``disable_guest_seccomp`` and ``vfio_mode`` are looked at.
    :param guest_selinux: whether SELinux labels go to the guest (``not disable_guest_selinux``).
    :returns: a new dict.
    """
    amended = copy.deepcopy(spec)
    amended["root"]["path"] = guest_rootfs
    amended["mounts"] = [dict(mount) for mount in mounts]
    amended["annotations"] = _annotations(oci.annotations(spec), container_type, bundle)
    _keep_guest_hooks(amended)
    linux = amended["linux"]
    linux["namespaces"] = guest_namespaces(linux.get("namespaces") or ())
    if "resources" in linux:
        linux["resources"] = guest_resources(linux["resources"])
    if linux.get("devices"):
        linux["devices"] = _devices(linux["devices"], runtime_config.vfio_mode)
    if runtime_config.disable_guest_seccomp:
        linux.pop("seccomp", None)
    if not guest_selinux:
        linux.pop("mountLabel", None)
        amended["process"].pop("selinuxLabel", None)
    return amended


def sandbox_pidns(spec):
    """Whether the container shares one pid namespace with its pod: the spec names one by path."""
    return bool(oci.namespace_path(spec, "pid"))


def guest_namespaces(namespaces):
    """The namespaces that a container gets in the guest, none by the path of a host's file."""
    return [{"type": entry["type"]} for entry in namespaces if entry["type"] not in _NOT_IN_GUEST]


def guest_resources(resources):
    """The limits that hold inside the guest too, as a new dict; also for an update's resources.

    CPU and NUMA node numbers are the host's, so cpusets are dropped (runtime-rs keeps `mems`, which
    fails for every node but 0).
    """
    kept = {key: copy.deepcopy(value) for key, value in (resources or {}).items()
            if key not in _HOST_RESOURCES}
    if isinstance(kept.get("cpu"), dict):
        kept["cpu"] = {key: value for key, value in kept["cpu"].items() if key not in ("cpus", "mems")}
    return kept


def _annotations(found, container_type, bundle):
    kept = {key: value for key, value in found.items() if key != INITDATA_ANNOTATION}
    kept.setdefault(TYPE_ANNOTATION, container_type)
    kept.setdefault(BUNDLE_ANNOTATION, bundle)
    return kept


def _keep_guest_hooks(amended):
    """startContainer hooks run inside the container, all others are the host's and run there."""
    hooks = amended.pop("hooks", None) or {}
    if hooks.get("startContainer"):
        amended["hooks"] = {"startContainer": hooks["startContainer"]}


def _devices(devices, vfio_mode):
    """Without the host's VFIO groups, unless the container drives them itself (``vfio_mode = "vfio"``)."""
    if vfio_mode == "vfio":
        return devices
    return [device for device in devices
            if not (device.get("type") == "c" and device.get("path", "").startswith("/dev/vfio/"))]
