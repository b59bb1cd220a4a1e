"""How many vCPUs and how much memory a sandbox's VM gets.

Static sizing (``static_sandbox_resource_mgmt``, the default): once, before boot, from the pod's
limits. Where Kata's runtime-rs differs, users' reports decided:

* CPUs and memory are settled each on its own. A pod with a memory limit and no CPU limit keeps
  ``default_vcpus`` (there, the one overwrites the other: kata-containers issues 13439, 11312).
* An annotation that asks for a size is a floor: a pod never gets less than it asked for.

Pure functions, called by the runtime before it prepares the hypervisor.
"""

import math
from typing import NamedTuple

# Where containerd's CRI plugin tells a pod's limits on its sandbox container (since 1.6).
SANDBOX_CPU_QUOTA = "io.kubernetes.cri.sandbox-cpu-quota"
SANDBOX_CPU_PERIOD = "io.kubernetes.cri.sandbox-cpu-period"
SANDBOX_MEMORY = "io.kubernetes.cri.sandbox-memory"

_DEFAULT_PERIOD_US = 100_000            # the kernel's, when a quota comes without one
_UNLIMITED_BYTES = 1 << 60              # runtimes write "no limit" as a page below 2**63


class Workload(NamedTuple):
    """What limits allow a pod or container to use.

    :ivar cpus: fractional CPUs, 0 for no limit.
    :ivar memory_mb: MiB, 0 for no limit.
    """

    cpus: float = 0.0
    memory_mb: int = 0


class Size(NamedTuple):
    """A VM's size, and why.

    :ivar vcpus: whole vCPUs.
    :ivar memory_mb: MiB, even.
    """

    vcpus: int
    memory_mb: int
    why_vcpus: str
    why_memory: str


def sandbox_size(config, spec):
    """``(vcpus, memory_mb)`` of the VM for a sandbox whose first container has `spec`.

    :param config: a katashim.config.Config.
    :param spec: the OCI spec, a dict.
    """
    size = explain_size(config, spec)
    return size.vcpus, size.memory_mb


def sized(config, spec):
    """`config` with the VM's size in it; ``config.source("hypervisor.default_vcpus")`` tells why."""
    size = explain_size(config, spec)
    config = config.with_values(size.why_vcpus, {"hypervisor.default_vcpus": float(size.vcpus)})
    config = config.with_values(size.why_memory, {"hypervisor.default_memory": size.memory_mb})
    if config.runtime.static_sandbox_resource_mgmt:         # nothing is plugged in later
        config = config.with_values(
            "static sizing", {"hypervisor.default_maxvcpus": size.vcpus,
                              "hypervisor.default_maxmemory": size.memory_mb})
    return config


def explain_size(config, spec):
    """The Size of the VM for a sandbox whose first container has `spec`."""
    load = sandbox_workload(spec)
    static = config.runtime.static_sandbox_resource_mgmt
    vcpus, why_vcpus = _vcpus(config, load, static)
    memory_mb, why_memory = _memory(config, load, static)
    return Size(vcpus, memory_mb, why_vcpus, why_memory)


def _vcpus(config, load, static):
    hypervisor, source = config.hypervisor, config.source("hypervisor.default_vcpus")
    if not load.cpus:
        wanted, why = source.value, f"no CPU limit: default_vcpus ({source.where})"
    elif not static:
        wanted, why = source.value + load.cpus, f"default_vcpus {source.value:g} + limit {load.cpus:g} CPUs"
    else:
        wanted = hypervisor.overhead_vcpus + load.cpus
        why = f"static sizing: overhead_vcpus {hypervisor.overhead_vcpus:g} + limit {load.cpus:g} CPUs"
        if source.where.startswith("annotation") and source.value > wanted:
            wanted, why = source.value, source.where
    most, whole = hypervisor.default_maxvcpus, max(1, math.ceil(round(wanted, 6)))
    if whole > most:
        return most, f"default_maxvcpus, less than {whole} ({why})"
    return whole, why


def _memory(config, load, static):
    hypervisor, source = config.hypervisor, config.source("hypervisor.default_memory")
    if not load.memory_mb:
        wanted, why = source.value, f"no memory limit: default_memory ({source.where})"
    elif not static:
        wanted, why = source.value + load.memory_mb, (
            f"default_memory {source.value} + limit {load.memory_mb} MiB")
    else:
        wanted = hypervisor.overhead_memory + load.memory_mb
        why = f"static sizing: overhead_memory {hypervisor.overhead_memory} + limit {load.memory_mb} MiB"
        if source.where.startswith("annotation") and source.value > wanted:
            wanted, why = source.value, source.where
    wanted = max(64, wanted + wanted % 2)
    if wanted > hypervisor.default_maxmemory:
        most = hypervisor.default_maxmemory
        return most - most % 2, f"default_maxmemory, less than {wanted} MiB ({why})"
    return wanted, why


# -- what pods and containers ask for -------------------------------------------------------------
def sandbox_workload(spec):
    """The Workload of a whole sandbox, from its first container's spec.

    A pod's sandbox container carries the pod's limits as annotations; a single container its own in
    ``linux.resources``. What the one does not say, the other may.
    """
    annotations = spec.get("annotations") or {}
    own = container_workload((spec.get("linux") or {}).get("resources"))
    pod = Workload(_cpus(_int(annotations.get(SANDBOX_CPU_QUOTA)), _int(annotations.get(SANDBOX_CPU_PERIOD))),
                   _mb(_int(annotations.get(SANDBOX_MEMORY))))
    first, second = (pod, own) if pod != Workload() else (own, pod)
    return Workload(first.cpus or second.cpus, first.memory_mb or second.memory_mb)


def container_workload(resources):
    """The Workload that a container's ``linux.resources`` (OCI, a dict or None) allow."""
    resources = resources or {}
    cpu, memory = resources.get("cpu") or {}, resources.get("memory") or {}
    huge = sum(limit.get("limit") or 0 for limit in resources.get("hugepageLimits") or ())
    limit = memory.get("limit") or 0
    return Workload(_cpus(cpu.get("quota") or 0, cpu.get("period") or 0),
                    _mb(limit + huge if 0 < limit < _UNLIMITED_BYTES else limit))


def total_size(config, resources):
    """``(vcpus, memory_mb)`` for a VM that is resized while it runs (no static sizing).

    Summed anew over the live containers each time, so that a crash-looping one cannot accumulate.

    :param resources: the ``linux.resources`` of each live container.
    """
    loads = [container_workload(one) for one in resources]
    vcpus = config.hypervisor.default_vcpus + sum(load.cpus for load in loads)
    memory_mb = config.hypervisor.default_memory + sum(load.memory_mb for load in loads)
    return (min(max(1, math.ceil(round(vcpus, 6))), config.hypervisor.default_maxvcpus),
            min(memory_mb + memory_mb % 2, config.hypervisor.default_maxmemory))


def _cpus(quota_us, period_us):
    return quota_us / (period_us or _DEFAULT_PERIOD_US) if quota_us > 0 else 0.0


def _mb(size_bytes):
    return (size_bytes + 0xFFFFF) >> 20 if 0 < size_bytes < _UNLIMITED_BYTES else 0


def _int(text):
    """An annotation's number; what is no number is no limit, as kubelet never writes one."""
    try:
        return int(text or 0)
    except ValueError:
        return 0
