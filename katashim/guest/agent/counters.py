"""The counters of a container's cgroup as ``grpc.CgroupStats``: what StatsContainer answers.

The message has version 1's shape; cgroup2's numbers are put into it the way upstream's agent does: times in
nanoseconds, the io counters as operations ``read``, ``write``, ``rios``, ``wios``, ``dbytes``, ``dios``, a
pids limit of 0 for none. What the kernel does not count is left out. Called by services.py.
"""

import os

from katashim.guest.agent import cgroup

NO_LIMIT = (1 << 63) - 1
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_IO_OPERATIONS = {"rbytes": "read", "wbytes": "write", "rios": "rios", "wios": "wios", "dbytes": "dbytes",
                  "dios": "dios"}
_BLKIO_FILES = ("io_service_bytes", "io_serviced", "io_queued", "io_service_time", "io_wait_time",
                "io_merged", "time", "sectors")


def read(group, make):
    """The counters of the cgroup.Cgroup `group`. :param make: ``make(type name, **fields)`` for messages."""
    reader = _Unified if cgroup.is_unified() else _Legacy
    return reader(group, make).message()


class _Reader:
    def __init__(self, group, make):
        self._group, self._make = group, make

    def message(self):
        return self._make("grpc.CgroupStats", cpu_stats=self._cpu(), memory_stats=self._memory(),
                          pids_stats=self._pids(), blkio_stats=self._blkio(), hugetlb_stats=self._hugetlb())

    def _file(self, controller, name):
        """The text of a cgroup file, "" where there is none."""
        try:
            with open(f"{self._group.directory(controller)}/{name}") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def _number(self, controller, name, none=0):
        """The number in a file, `none` where there is no file or no limit."""
        text = self._file(controller, name).strip()
        return int(text) if text.isdigit() else none

    def _table(self, controller, name):
        rows = (line.split() for line in self._file(controller, name).splitlines())
        return {key: int(value) for key, value in rows}

    def _pids(self):
        return self._make("grpc.PidsStats", current=self._number("pids", "pids.current"),
                          limit=self._number("pids", "pids.max"))

    def _entry(self, device, operation, value):
        major, _, minor = device.partition(":")
        return self._make("grpc.BlkioStatsEntry", major=int(major), minor=int(minor), op=operation,
                          value=value)

    def _hugetlb(self):
        """One for each page size that the kernel has a directory of files for."""
        directory = self._group.directory("hugetlb")
        sizes = {name.split(".")[1] for name in (os.listdir(directory) if os.path.isdir(directory) else ())
                 if name.startswith("hugetlb.")}
        return {size: self._make("grpc.HugetlbStats", **self._huge_pages(size)) for size in sorted(sizes)}


class _Unified(_Reader):
    def _cpu(self):
        stat = self._table("", "cpu.stat")
        return self._make(
            "grpc.CpuStats",
            cpu_usage=self._make("grpc.CpuUsage", total_usage=stat.get("usage_usec", 0) * 1000,
                                 usage_in_usermode=stat.get("user_usec", 0) * 1000,
                                 usage_in_kernelmode=stat.get("system_usec", 0) * 1000),
            throttling_data=self._make("grpc.ThrottlingData", periods=stat.get("nr_periods", 0),
                                       throttled_periods=stat.get("nr_throttled", 0),
                                       throttled_time=stat.get("throttled_usec", 0) * 1000))

    def _memory(self):
        stat, events = self._table("", "memory.stat"), self._table("", "memory.events")
        usage = self._number("", "memory.current")
        swap = self._number("", "memory.swap.current")
        limit = self._number("", "memory.max", NO_LIMIT)
        return self._make(
            "grpc.MemoryStats", cache=stat.get("file", 0), use_hierarchy=True, stats=stat,
            usage=self._make("grpc.MemoryData", usage=usage, max_usage=self._number("", "memory.peak", usage),
                             failcnt=events.get("max", 0), limit=limit),
            swap_usage=self._make("grpc.MemoryData", usage=swap, max_usage=swap,
                                  limit=self._number("", "memory.swap.max", NO_LIMIT)),
            kernel_usage=self._make("grpc.MemoryData", usage=stat.get("kernel", 0)))

    def _blkio(self):
        entries = []
        for line in self._file("", "io.stat").splitlines():
            device, *pairs = line.split()
            for key, value in (pair.split("=") for pair in pairs):
                if key in _IO_OPERATIONS:
                    entries.append(self._entry(device, _IO_OPERATIONS[key], int(value)))
        return self._make("grpc.BlkioStats", io_service_bytes_recursive=entries)

    def _huge_pages(self, size):
        return {"usage": self._number("", f"hugetlb.{size}.current"),
                "max_usage": self._number("", f"hugetlb.{size}.current"),
                "failcnt": self._table("", f"hugetlb.{size}.events").get("max", 0)}


class _Legacy(_Reader):
    def _cpu(self):
        times, throttling = self._table("cpuacct", "cpuacct.stat"), self._table("cpu", "cpu.stat")
        per_cpu = self._file("cpuacct", "cpuacct.usage_percpu").split()
        return self._make(
            "grpc.CpuStats",
            cpu_usage=self._make("grpc.CpuUsage", total_usage=self._number("cpuacct", "cpuacct.usage"),
                                 percpu_usage=[int(word) for word in per_cpu],
                                 usage_in_usermode=times.get("user", 0) * _TICK_NS,
                                 usage_in_kernelmode=times.get("system", 0) * _TICK_NS),
            throttling_data=self._make("grpc.ThrottlingData", periods=throttling.get("nr_periods", 0),
                                       throttled_periods=throttling.get("nr_throttled", 0),
                                       throttled_time=throttling.get("throttled_time", 0)))

    def _memory(self):
        stat = self._table("memory", "memory.stat")
        return self._make(
            "grpc.MemoryStats", cache=stat.get("cache", 0), stats=stat,
            use_hierarchy=self._number("memory", "memory.use_hierarchy") == 1, usage=self._account("memory"),
            swap_usage=self._account("memory.memsw"), kernel_usage=self._account("memory.kmem"))

    def _account(self, prefix):
        return self._make("grpc.MemoryData", usage=self._number("memory", f"{prefix}.usage_in_bytes"),
                          max_usage=self._number("memory", f"{prefix}.max_usage_in_bytes"),
                          failcnt=self._number("memory", f"{prefix}.failcnt"),
                          limit=self._number("memory", f"{prefix}.limit_in_bytes"))

    def _blkio(self):
        fields = {}
        for name in _BLKIO_FILES:
            text = (self._file("blkio", f"blkio.{name}_recursive")
                    or self._file("blkio", f"blkio.throttle.{name}_recursive"))
            rows = [line.split() for line in text.splitlines()]
            field = "io_time_recursive" if name == "time" else f"{name}_recursive"
            fields[field] = [self._entry(row[0], row[1].lower() if len(row) == 3 else "", int(row[-1]))
                             for row in rows if ":" in row[0]]
        return self._make("grpc.BlkioStats", **fields)

    def _huge_pages(self, size):
        return {"usage": self._number("hugetlb", f"hugetlb.{size}.usage_in_bytes"),
                "max_usage": self._number("hugetlb", f"hugetlb.{size}.max_usage_in_bytes"),
                "failcnt": self._number("hugetlb", f"hugetlb.{size}.failcnt")}
