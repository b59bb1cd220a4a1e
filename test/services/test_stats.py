"""Figures of real cgroups (of a busybox container with limits), as agents of both kinds of guests send them."""

import pytest

from katashim.services import stats
from katashim.ttrpc import proto

NO_LIMIT_V1, NO_LIMIT_V2 = 9223372036854771712, 2**64 - 1

V1_MEMORY = {
    "cache": 1351680, "rss": 270336, "rss_huge": 2097152, "shmem": 0, "mapped_file": 811008, "dirty": 135168,
    "writeback": 4096, "pgpgin": 1188, "pgpgout": 792, "pgfault": 1320, "pgmajfault": 3, "inactive_anon": 131072,
    "active_anon": 139264, "inactive_file": 540672, "active_file": 811009, "unevictable": 7,
    "hierarchical_memory_limit": 67108864, "hierarchical_memsw_limit": 134217728, "total_cache": 1351681,
    "total_rss": 270337, "total_rss_huge": 2097153, "total_mapped_file": 811010, "total_dirty": 135169,
    "total_writeback": 4097, "total_pgpgin": 1189, "total_pgpgout": 793, "total_pgfault": 1321,
    "total_pgmajfault": 4, "total_inactive_anon": 131073, "total_active_anon": 139265,
    "total_inactive_file": 540673, "total_active_file": 811011, "total_unevictable": 8}
RUNC_MEMORY = {"pg_pg_in": 11, "pg_pg_out": 12, "pg_fault": 13, "pg_maj_fault": 14, "total_pg_fault": 15,
               "hierarchical_swap_limit": 16, "cache": 17, "rss": 18}
V2_MEMORY = {
    "anon": 118784, "file": 1351680, "kernel_stack": 16384, "slab": 66000, "sock": 4096, "shmem": 8192,
    "file_mapped": 811008, "file_dirty": 135168, "file_writeback": 1, "anon_thp": 2097152, "inactive_anon": 2,
    "active_anon": 3, "inactive_file": 4, "active_file": 5, "unevictable": 6, "slab_reclaimable": 7,
    "slab_unreclaimable": 8, "pgfault": 1320, "pgmajfault": 9, "workingset_refault_file": 10,
    "workingset_activate_file": 11, "workingset_nodereclaim": 12, "pgrefill": 13, "pgscan": 14, "pgsteal": 15,
    "pgactivate": 16, "pgdeactivate": 17, "pglazyfree": 18, "pglazyfreed": 19, "thp_fault_alloc": 20,
    "thp_collapse_alloc": 21}
CPU = {"cpu_usage": {"total_usage": 123456789, "percpu_usage": [100000000, 23456789],
                     "usage_in_kernelmode": 20000000, "usage_in_usermode": 103456789},
       "throttling_data": {"periods": 10, "throttled_periods": 4, "throttled_time": 56789000}}


def answer(memory, **fields):
    figures = {"cpu_stats": CPU, "pids_stats": {"current": 3, "limit": 100}, "memory_stats": memory, **fields}
    return proto.build(proto.get("grpc.StatsContainerResponse"), cgroup_stats=figures, network_stats=[
        {"name": "eth0", "rx_bytes": 1, "rx_packets": 2, "rx_errors": 3, "rx_dropped": 4,
         "tx_bytes": 5, "tx_packets": 6, "tx_errors": 7, "tx_dropped": 8}])


def entry(op, value, major=254, minor=0):
    return {"major": major, "minor": minor, "op": op, "value": value}


V1_BLKIO = {"io_service_bytes_recursive": [entry("Read", 4096), entry("Write", 8192), entry("Total", 12288)],
            "io_serviced_recursive": [entry("Read", 1), entry("Write", 2), entry("Total", 3)],
            "io_queued_recursive": [entry("Total", 9)], "sectors_recursive": [entry("", 24, 8, 16)]}
V2_BLKIO = {"io_service_bytes_recursive": [
    entry("read", 4096), entry("write", 8192), entry("rios", 1), entry("wios", 2), entry("dbytes", 512),
    entry("dios", 5), entry("read", 77, 8, 16)]}


def v1_guest(**fields):
    return answer({"cache": 1, "usage": {"usage": 1835008, "max_usage": 4000000, "failcnt": 2, "limit": 67108864},
                   "swap_usage": {"usage": 1935008, "max_usage": 5000000, "limit": 134217728},
                   "kernel_usage": {"usage": 65536, "max_usage": 70000, "limit": NO_LIMIT_V1},
                   "stats": V1_MEMORY}, blkio_stats=V1_BLKIO, **fields)


def v2_guest(**fields):
    return answer({"usage": {"usage": 1835008, "max_usage": 4000000, "limit": 67108864},
                   "swap_usage": {"usage": 100000, "max_usage": 200000, "limit": 1000000},
                   "stats": V2_MEMORY}, blkio_stats=V2_BLKIO, **fields)


# -- a host with cgroup v1 ----------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["v1", "hybrid"])
def test_v1_guest_on_a_v1_host(mode):
    metrics = stats.to_metrics(v1_guest(), mode)
    assert metrics.DESCRIPTOR.full_name == "io.containerd.cgroups.v1.Metrics"
    memory = metrics.memory
    names = ["cache", "rss", "rss_huge", "mapped_file", "dirty", "writeback", "pg_pg_in", "pg_pg_out", "pg_fault",
             "pg_maj_fault", "inactive_anon", "active_anon", "inactive_file", "active_file", "unevictable"]
    own = [getattr(memory, name) for name in names]
    assert own == [1351680, 270336, 2097152, 811008, 135168, 4096, 1188, 792, 1320, 3, 131072, 139264, 540672,
                   811009, 7]
    assert [getattr(memory, "total_" + name) for name in names] == [value + 1 for value in own[:3]] + [
        811010, 135169, 4097, 1189, 793, 1321, 4, 131073, 139265, 540673, 811011, 8]
    assert (memory.hierarchical_memory_limit, memory.hierarchical_swap_limit) == (67108864, 134217728)
    assert (memory.usage.usage, memory.usage.max, memory.usage.failcnt, memory.usage.limit) == (
        1835008, 4000000, 2, 67108864)
    assert (memory.swap.usage, memory.swap.max, memory.swap.limit) == (1935008, 5000000, 134217728)
    assert (memory.kernel.usage, memory.kernel.limit) == (65536, NO_LIMIT_V1)


def test_cpu_pids_and_network_on_a_v1_host():
    metrics = stats.to_metrics(v1_guest(), "v1")
    usage, throttling = metrics.cpu.usage, metrics.cpu.throttling
    assert (usage.total, usage.kernel, usage.user) == (123456789, 20000000, 103456789)
    assert list(usage.per_cpu) == [100000000, 23456789]
    assert (throttling.periods, throttling.throttled_periods, throttling.throttled_time) == (10, 4, 56789000)
    assert (metrics.pids.current, metrics.pids.limit) == (3, 100)
    link, = metrics.network
    assert (link.name, link.rx_bytes, link.rx_packets, link.rx_errors, link.rx_dropped, link.tx_bytes,
            link.tx_packets, link.tx_errors, link.tx_dropped) == ("eth0", 1, 2, 3, 4, 5, 6, 7, 8)


def test_blkio_on_a_v1_host():
    blkio = stats.to_metrics(v1_guest(), "v1").blkio
    assert [(each.op, each.major, each.minor, each.value) for each in blkio.io_service_bytes_recursive] == [
        ("Read", 254, 0, 4096), ("Write", 254, 0, 8192), ("Total", 254, 0, 12288)]
    assert [each.value for each in blkio.io_serviced_recursive] == [1, 2, 3]
    assert blkio.io_queued_recursive[0].value == 9
    assert (blkio.sectors_recursive[0].major, blkio.sectors_recursive[0].value) == (8, 24)


def test_runcs_spelling_of_keys():
    memory = stats.to_metrics(answer({"stats": RUNC_MEMORY}), "v1").memory
    assert (memory.pg_pg_in, memory.pg_pg_out, memory.pg_fault, memory.pg_maj_fault) == (11, 12, 13, 14)
    assert (memory.total_pg_fault, memory.hierarchical_swap_limit, memory.cache, memory.rss) == (15, 16, 17, 18)
    memory = stats.to_metrics(answer({"stats": RUNC_MEMORY}), "v2").memory
    assert (memory.pgfault, memory.pgmajfault, memory.file, memory.anon) == (13, 14, 17, 18)


def test_v2_guest_on_a_v1_host():
    metrics = stats.to_metrics(v2_guest(), "v1")
    memory = metrics.memory
    assert (memory.cache, memory.rss, memory.rss_huge, memory.mapped_file, memory.dirty, memory.writeback) == (
        1351680, 118784, 2097152, 811008, 135168, 1)
    assert (memory.pg_fault, memory.pg_maj_fault, memory.inactive_anon, memory.unevictable) == (1320, 9, 2, 6)
    # v2 counts everything below a cgroup with it.
    assert (memory.total_cache, memory.total_rss, memory.total_pg_fault) == (1351680, 118784, 1320)
    # v1's swap figure includes the memory.
    assert (memory.swap.usage, memory.swap.max, memory.swap.limit) == (1935008, 4200000, 68108864)
    blkio = metrics.blkio
    assert [(each.op, each.major, each.value) for each in blkio.io_service_bytes_recursive] == [
        ("Read", 254, 4096), ("Write", 254, 8192), ("Discard", 254, 512), ("Read", 8, 77)]
    assert [(each.op, each.value) for each in blkio.io_serviced_recursive] == [
        ("Read", 1), ("Write", 2), ("Discard", 5)]


# -- a host with cgroup v2 ----------------------------------------------------------------------------

def test_v2_guest_on_a_v2_host():
    metrics = stats.to_metrics(v2_guest(), "v2")
    assert metrics.DESCRIPTOR.full_name == "io.containerd.cgroups.v2.Metrics"
    memory = metrics.memory
    for name, value in V2_MEMORY.items():
        assert getattr(memory, name.removesuffix("_file") if name.startswith("workingset") else name) == value, name
    assert (memory.usage, memory.usage_limit, memory.max_usage) == (1835008, 67108864, 4000000)
    assert (memory.swap_usage, memory.swap_limit, memory.swap_max_usage) == (100000, 1000000, 200000)
    assert [(each.major, each.minor, each.rbytes, each.wbytes, each.rios, each.wios)
            for each in metrics.io.usage] == [(8, 16, 77, 0, 0, 0), (254, 0, 4096, 8192, 1, 2)]


def test_cpu_pids_and_network_on_a_v2_host():
    metrics = stats.to_metrics(v2_guest(), "v2")
    cpu = metrics.cpu
    assert (cpu.usage_usec, cpu.system_usec, cpu.user_usec) == (123456, 20000, 103456)
    assert (cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec) == (10, 4, 56789)
    assert (metrics.pids.current, metrics.pids.limit) == (3, 100)
    assert metrics.network[0].tx_dropped == 8


def test_v1_guest_on_a_v2_host():
    metrics = stats.to_metrics(v1_guest(), "v2")
    memory = metrics.memory
    # v1's totals are what v2 counts.
    assert (memory.anon, memory.file, memory.file_mapped, memory.file_dirty, memory.anon_thp) == (
        270337, 1351681, 811010, 135169, 2097153)
    assert (memory.swap_usage, memory.swap_limit, memory.swap_max_usage) == (100000, 67108864, 0)
    assert [(each.major, each.rbytes, each.wbytes, each.rios, each.wios) for each in metrics.io.usage] == [
        (254, 4096, 8192, 1, 2)]


# -- limits, hugepages, nothing -----------------------------------------------------------------------

@pytest.mark.parametrize("unlimited", [NO_LIMIT_V1, 2**63 - 1, 2**64 - 1])
def test_no_limit_is_told_in_the_hosts_words(unlimited):
    for keys in (V1_MEMORY, V2_MEMORY):
        message = answer({"usage": {"usage": 5, "limit": unlimited}, "swap_usage": {"usage": 7, "limit": unlimited},
                          "stats": keys}, pids_stats={"current": 1})
        v1 = stats.to_metrics(message, "v1")
        assert v1.memory.usage.limit == v1.memory.swap.limit == NO_LIMIT_V1 and v1.pids.limit == 0
        v2 = stats.to_metrics(message, "v2")
        assert v2.memory.usage_limit == v2.memory.swap_limit == NO_LIMIT_V2 == v2.pids.limit


def test_hugepages():
    sizes = {"2MB": {"usage": 4194304, "max_usage": 8388608, "failcnt": 1}, "1GB": {}}
    one, two = stats.to_metrics(v1_guest(hugetlb_stats=sizes), "v1").hugetlb
    assert (one.pagesize, two.pagesize, two.usage, two.max, two.failcnt) == ("1GB", "2MB", 4194304, 8388608, 1)
    one, two = stats.to_metrics(v1_guest(hugetlb_stats=sizes), "v2").hugetlb
    assert (one.pagesize, two.pagesize, two.current, two.max, two.failcnt) == ("1GB", "2MB", 4194304, 8388608, 1)


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_an_empty_answer_is_translated(mode):
    metrics = stats.to_metrics(proto.get("grpc.StatsContainerResponse")(), mode)
    packed = proto.pack_any(metrics)
    assert packed.type_url == f"io.containerd.cgroups.{mode}.Metrics"
    assert proto.unpack_any(packed) == metrics
    # containerd's own tools read these without asking whether they are there.
    assert metrics.HasField("memory") and metrics.HasField("cpu") and metrics.HasField("pids")


def test_a_cache_outside_of_the_map_is_told():
    message = answer({"cache": 4711, "stats": {"rss": 1}})
    assert stats.to_metrics(message, "v1").memory.cache == 4711
    assert stats.to_metrics(message, "v2").memory.file == 4711
