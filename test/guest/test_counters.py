"""Counters of containers, from cgroup files of both versions, as the one message that hosts know."""

import pytest

from katashim.guest import tables, wire
from katashim.guest.agent import cgroup, counters

CODEC = wire.Codec(tables.load()[0])


def make(name, **fields):
    return CODEC.type(name)(**fields)


def write(directory, files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """``read()`` -> the message for the cgroup /c."""
    monkeypatch.setattr(cgroup, "ROOT", str(tmp_path))
    monkeypatch.setattr(cgroup, "_CGROUP2_MAGIC_FILE", str(tmp_path / "cgroup.controllers"))

    def make_message():
        message = counters.read(cgroup.Cgroup("/c"), make)
        return CODEC.decode(CODEC.type("grpc.CgroupStats"), CODEC.encode(message))
    return make_message


def test_cgroup2(tmp_path, read):
    write(tmp_path, {"cgroup.controllers": "cpu memory"})
    write(tmp_path / "c", {
        "cpu.stat": "usage_usec 70\nuser_usec 40\nsystem_usec 30\n"
                    "nr_periods 3\nnr_throttled 2\nthrottled_usec 5\n",
        "memory.current": "4096\n", "memory.max": "max\n", "memory.peak": "8192\n",
        "memory.stat": "anon 10\nfile 20\nkernel 30\n", "memory.events": "low 0\nmax 7\noom_kill 1\n",
        "memory.swap.current": "0\n", "memory.swap.max": "1024\n",
        "pids.current": "2\n", "pids.max": "max\n",
        "io.stat": "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n254:16 \n",
        "hugetlb.2MB.current": "2097152\n", "hugetlb.2MB.events": "max 4\n"})
    stats = read()
    assert stats.cpu_stats.cpu_usage.total_usage == 70_000
    assert stats.cpu_stats.cpu_usage.usage_in_usermode == 40_000
    assert stats.cpu_stats.throttling_data.throttled_time == 5_000
    memory, usage = stats.memory_stats, stats.memory_stats.usage
    assert (memory.cache, usage.usage, usage.max_usage, usage.failcnt) == (20, 4096, 8192, 7)
    assert (usage.limit, memory.swap_usage.limit) == (counters.NO_LIMIT, 1024)
    assert memory.stats == {"anon": 10, "file": 20, "kernel": 30}
    assert (stats.pids_stats.current, stats.pids_stats.limit) == (2, 0)
    entries = {item.op: (item.major, item.minor, item.value) for item in
               stats.blkio_stats.io_service_bytes_recursive}
    assert entries == {"read": (254, 0, 1), "write": (254, 0, 2), "rios": (254, 0, 3), "wios": (254, 0, 4),
                       "dbytes": (254, 0, 5), "dios": (254, 0, 6)}
    assert stats.hugetlb_stats["2MB"].usage == 2 << 20
    assert stats.hugetlb_stats["2MB"].failcnt == 4


def test_version_1(tmp_path, read):
    write(tmp_path / "cpuacct" / "c", {"cpuacct.usage": "900\n", "cpuacct.usage_percpu": "400 500 \n",
                                       "cpuacct.stat": "user 2\nsystem 1\n"})
    write(tmp_path / "cpu" / "c", {"cpu.stat": "nr_periods 3\nnr_throttled 2\nthrottled_time 5\n"})
    write(tmp_path / "memory" / "c", {
        "memory.usage_in_bytes": "4096\n", "memory.limit_in_bytes": "9223372036854771712\n",
        "memory.max_usage_in_bytes": "8192\n", "memory.failcnt": "7\n", "memory.use_hierarchy": "1\n",
        "memory.stat": "cache 20\nrss 10\n", "memory.memsw.usage_in_bytes": "5000\n"})
    write(tmp_path / "pids" / "c", {"pids.current": "2\n", "pids.max": "50\n"})
    write(tmp_path / "blkio" / "c", {
        "blkio.throttle.io_service_bytes_recursive": "254:0 Read 11\n254:0 Write 12\nTotal 23\n",
        "blkio.time_recursive": "254:0 99\n"})
    stats = read()
    assert stats.cpu_stats.cpu_usage.total_usage == 900
    assert list(stats.cpu_stats.cpu_usage.percpu_usage) == [400, 500]
    assert stats.cpu_stats.cpu_usage.usage_in_usermode == 2 * counters._TICK_NS
    assert stats.cpu_stats.throttling_data.periods == 3
    assert (stats.memory_stats.cache, stats.memory_stats.usage.usage) == (20, 4096)
    assert (stats.memory_stats.use_hierarchy, stats.memory_stats.swap_usage.usage) == (True, 5000)
    assert (stats.pids_stats.current, stats.pids_stats.limit) == (2, 50)
    assert [(item.op, item.value) for item in stats.blkio_stats.io_service_bytes_recursive] == [
        ("read", 11), ("write", 12)]
    assert [(item.op, item.value) for item in stats.blkio_stats.io_time_recursive] == [("", 99)]


def test_a_kernel_that_counts_nothing(tmp_path, read):
    write(tmp_path, {"cgroup.controllers": ""})
    write(tmp_path / "c", {})
    stats = read()
    assert stats.cpu_stats.cpu_usage.total_usage == 0
    assert stats.hugetlb_stats == {}
