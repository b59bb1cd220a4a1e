"""A container's figures, from the guest agent's words into containerd's.

The agent answers StatsContainer with one message for both cgroup versions (``grpc.CgroupStats``: v1's
nouns, times in ns), whose memory map has the keys of the *guest's* ``memory.stat``. containerd expects
``io.containerd.cgroups.v1.Metrics`` or ``.v2.Metrics``, by the *host's* version. So all four combinations
occur, and some agents use runc's spelling of keys (``pg_fault``) instead of the kernel's (``pgfault``).

Called by katashim.services.task. Pure translation.
"""

from katashim.ttrpc import proto

_UNLIMITED_V1 = 0x7FFFFFFFFFFFF000          # what a v1 kernel reports for "no limit"
_UNLIMITED_V2 = 0xFFFFFFFFFFFFFFFF          # what containerd reports for "max"

# Field of containerd's v1 MemoryStat -> keys of the agent's memory map, the first that is there counts:
# cgroup v1's, runc's, and the nearest thing in cgroup v2.
_V1_MEMORY = {
    "cache": ("cache", "file"),
    "rss": ("rss", "anon"),
    "rss_huge": ("rss_huge", "anon_thp"),
    "mapped_file": ("mapped_file", "file_mapped"),
    "dirty": ("dirty", "file_dirty"),
    "writeback": ("writeback", "file_writeback"),
    "pg_pg_in": ("pgpgin", "pg_pg_in"),
    "pg_pg_out": ("pgpgout", "pg_pg_out"),
    "pg_fault": ("pgfault", "pg_fault"),
    "pg_maj_fault": ("pgmajfault", "pg_maj_fault"),
    "inactive_anon": ("inactive_anon",),
    "active_anon": ("active_anon",),
    "inactive_file": ("inactive_file",),
    "active_file": ("active_file",),
    "unevictable": ("unevictable",),
}
_V1_LIMITS = {
    "hierarchical_memory_limit": ("hierarchical_memory_limit",),
    "hierarchical_swap_limit": ("hierarchical_memsw_limit", "hierarchical_swap_limit"),
}
# Field of containerd's v2 MemoryStat -> keys, where they differ from the field's name.
_V2_MEMORY = {
    "anon": ("anon", "total_rss", "rss"),
    "file": ("file", "total_cache", "cache"),
    "file_mapped": ("file_mapped", "total_mapped_file", "mapped_file"),
    "file_dirty": ("file_dirty", "total_dirty", "dirty"),
    "file_writeback": ("file_writeback", "total_writeback", "writeback"),
    "anon_thp": ("anon_thp", "total_rss_huge", "rss_huge"),
    "pgfault": ("pgfault", "pg_fault"),
    "pgmajfault": ("pgmajfault", "pg_maj_fault"),
    "workingset_refault": ("workingset_refault", "workingset_refault_file"),
    "workingset_activate": ("workingset_activate", "workingset_activate_file"),
}
_V2_SAME = ("kernel_stack", "slab", "sock", "shmem", "inactive_anon", "active_anon", "inactive_file",
            "active_file", "unevictable", "slab_reclaimable", "slab_unreclaimable", "workingset_nodereclaim",
            "pgrefill", "pgscan", "pgsteal", "pgactivate", "pgdeactivate", "pglazyfree", "pglazyfreed",
            "thp_fault_alloc", "thp_collapse_alloc")

# The agent's op on a guest with cgroup v2 (rust spelling of io.stat's keys) -> list of v1, op of v1.
_V2_OPS = {
    "read": ("io_service_bytes_recursive", "Read"), "rbytes": ("io_service_bytes_recursive", "Read"),
    "write": ("io_service_bytes_recursive", "Write"), "wbytes": ("io_service_bytes_recursive", "Write"),
    "dbytes": ("io_service_bytes_recursive", "Discard"),
    "rios": ("io_serviced_recursive", "Read"), "wios": ("io_serviced_recursive", "Write"),
    "dios": ("io_serviced_recursive", "Discard"),
}
_IO_FIELDS = {
    ("io_service_bytes_recursive", "Read"): "rbytes", ("io_service_bytes_recursive", "Write"): "wbytes",
    ("io_serviced_recursive", "Read"): "rios", ("io_serviced_recursive", "Write"): "wios",
}
_BLKIO_LISTS = ("io_service_bytes_recursive", "io_serviced_recursive", "io_queued_recursive",
                "io_service_time_recursive", "io_wait_time_recursive", "io_merged_recursive",
                "io_time_recursive", "sectors_recursive")


def to_metrics(stats, mode):
    """Translate the agent's answer.

    :param stats: ``grpc.StatsContainerResponse``.
    :param mode: the host's cgroups, "v1", "v2" or "hybrid" (of katashim.host.cgroup_mode). On a hybrid
        host containerd, like every runtime, works with v1.
    :returns: ``io.containerd.cgroups.v1.Metrics`` or ``.v2.Metrics``, for proto.pack_any.
    """
    return _v2_metrics(stats) if mode == "v2" else _v1_metrics(stats)


# -- cgroup v1 --------------------------------------------------------------------------------------

def _v1_metrics(stats):
    figures = stats.cgroup_stats
    usage, throttling = figures.cpu_stats.cpu_usage, figures.cpu_stats.throttling_data
    return proto.build(
        proto.get("io.containerd.cgroups.v1.Metrics"),
        hugetlb=[{"usage": size.usage, "max": size.max_usage, "failcnt": size.failcnt, "pagesize": name}
                 for name, size in sorted(figures.hugetlb_stats.items())],
        pids={"current": figures.pids_stats.current, "limit": figures.pids_stats.limit},
        cpu={"usage": {"total": usage.total_usage, "kernel": usage.usage_in_kernelmode,
                       "user": usage.usage_in_usermode, "per_cpu": list(usage.percpu_usage)},
             "throttling": {"periods": throttling.periods, "throttled_periods": throttling.throttled_periods,
                            "throttled_time": throttling.throttled_time}},
        memory=_v1_memory(figures.memory_stats),
        blkio=_v1_blkio(figures.blkio_stats),
        network=_network(stats))


def _v1_memory(memory):
    keys = memory.stats
    fields = {field: _first(keys, names) for field, names in {**_V1_MEMORY, **_V1_LIMITS}.items()}
    for field, names in _V1_MEMORY.items():
        # v2 counts a cgroup and all below it, so there the totals are the figures themselves.
        fields["total_" + field] = _first(keys, tuple("total_" + name for name in names) + names)
    # v1 counts memory and swap together, v2 swap alone.
    with_swap = _is_v2_guest(keys) and memory.HasField("swap_usage")
    fields["usage"] = _v1_entry(memory.usage)
    fields["swap"] = _v1_entry(memory.swap_usage, memory.usage if with_swap else None)
    fields["kernel"] = _v1_entry(memory.kernel_usage)
    # An agent may tell the cache apart from the map.
    fields["cache"] = fields["cache"] if fields["cache"] is not None else memory.cache
    return fields


def _v1_entry(data, memory=None):
    """A MemoryEntry of the agent's MemoryData; with `memory` added, where `data` is v2's swap alone."""
    limit, usage, peak = data.limit, data.usage, data.max_usage
    if memory is not None:
        unlimited = _is_unlimited(limit) or _is_unlimited(memory.limit)
        limit = _UNLIMITED_V1 if unlimited else limit + memory.limit
        usage, peak = usage + memory.usage, peak + memory.max_usage
    return {"limit": min(limit, _UNLIMITED_V1), "usage": usage, "max": peak, "failcnt": data.failcnt}


def _v1_blkio(blkio):
    lists = {name: [] for name in _BLKIO_LISTS}
    for name, entry, op in _blkio_entries(blkio):
        lists[name].append({"op": op, "major": entry.major, "minor": entry.minor, "value": entry.value})
    return lists


# -- cgroup v2 --------------------------------------------------------------------------------------

def _v2_metrics(stats):
    figures = stats.cgroup_stats
    usage, throttling = figures.cpu_stats.cpu_usage, figures.cpu_stats.throttling_data
    pids = figures.pids_stats
    return proto.build(
        proto.get("io.containerd.cgroups.v2.Metrics"),
        pids={"current": pids.current, "limit": pids.limit or _UNLIMITED_V2},
        cpu={"usage_usec": usage.total_usage // 1000, "user_usec": usage.usage_in_usermode // 1000,
             "system_usec": usage.usage_in_kernelmode // 1000, "nr_periods": throttling.periods,
             "nr_throttled": throttling.throttled_periods, "throttled_usec": throttling.throttled_time // 1000},
        memory=_v2_memory(figures.memory_stats),
        io={"usage": _v2_io(figures.blkio_stats)},
        hugetlb=[{"current": size.usage, "max": size.max_usage, "pagesize": name, "failcnt": size.failcnt}
                 for name, size in sorted(figures.hugetlb_stats.items())],
        network=_network(stats))


def _v2_memory(memory):
    keys = memory.stats
    fields = {field: _first(keys, names) for field, names in _V2_MEMORY.items()}
    for name in _V2_SAME:
        fields[name] = _first(keys, (name, "total_" + name))
    usage, swap = memory.usage, memory.swap_usage
    if fields["file"] is None:
        fields["file"] = memory.cache
    fields.update(usage=usage.usage, usage_limit=_v2_limit(usage.limit), max_usage=usage.max_usage)
    if _is_v2_guest(keys):
        fields.update(swap_usage=swap.usage, swap_limit=_v2_limit(swap.limit), swap_max_usage=swap.max_usage)
    elif memory.HasField("swap_usage"):
        # v1's figure is memory and swap together. Their maxima may be of different moments, so there is
        # no maximum of swap alone.
        limit = _UNLIMITED_V2 if _is_unlimited(swap.limit) else max(swap.limit - usage.limit, 0)
        fields.update(swap_usage=max(swap.usage - usage.usage, 0), swap_limit=limit)
    return fields


def _v2_limit(limit):
    return _UNLIMITED_V2 if _is_unlimited(limit) else limit


def _v2_io(blkio):
    devices = {}
    for name, entry, op in _blkio_entries(blkio):
        field = _IO_FIELDS.get((name, op))
        if field is not None:
            device = devices.setdefault((entry.major, entry.minor), {})
            device[field] = device.get(field, 0) + entry.value
    return [{"major": major, "minor": minor, **fields} for (major, minor), fields in sorted(devices.items())]


# -- both -------------------------------------------------------------------------------------------

def _blkio_entries(blkio):
    """``(list of v1, entry, op of v1)`` for each entry, whichever way the guest counts."""
    for name in _BLKIO_LISTS:
        for entry in getattr(blkio, name):
            # Only v2's ops are in lower case: v1's are Read, Write, Sync, Async, Discard, Total.
            place, op = _V2_OPS.get(entry.op, (name, entry.op))
            yield place, entry, op


def _network(stats):
    fields = ("name", "rx_bytes", "rx_packets", "rx_errors", "rx_dropped",
              "tx_bytes", "tx_packets", "tx_errors", "tx_dropped")
    return [{field: getattr(link, field) for field in fields} for link in stats.network_stats]


def _is_v2_guest(keys):
    return "anon" in keys and "rss" not in keys


def _is_unlimited(limit):
    return limit >= _UNLIMITED_V1


def _first(keys, names):
    """The value of the first of `names` that the map has, None when it has none of them."""
    for name in names:
        if name in keys:
            return keys[name]
    return None
