"""GetMetrics: counters of agent and guest as Prometheus text, by upstream's names. Called by pod_rpcs.py."""

import os

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
_DISK_COLUMNS = (
    "reads", "reads_merged", "sectors_read", "time_reading", "writes", "writes_merged", "sectors_written",
    "time_writing", "in_progress", "time_in_progress", "weighted_time_in_progress", "discards",
    "discards_merged", "sectors_discarded", "time_discarding", "flushes", "time_flushing")
_NET_COLUMNS = (
    "recv_bytes", "recv_packets", "recv_errs", "recv_drop", "recv_fifo", "recv_frame", "recv_compressed",
    "recv_multicast", "sent_bytes", "sent_packets", "sent_errs", "sent_drop", "sent_fifo", "sent_colls",
    "sent_carrier", "sent_compressed")
_CPU_COLUMNS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")

_scrapes = 0


def text():
    """All metrics, one line for each sample after a line with the metric's type."""
    global _scrapes
    _scrapes += 1
    lines = []
    for name, kind, samples in (*_of_agent(), *_of_guest()):
        lines.append(f"# TYPE {name} {kind}")
        lines += [f"{name}{_labels(labels)} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _of_agent():
    status = dict(line.split(":", 1) for line in _lines("/proc/self/status"))
    stat = _lines("/proc/self/stat")[0].rpartition(")")[2].split()
    io = [line.split(": ") for line in _lines("/proc/self/io")]
    yield "kata_agent_scrape_count", "counter", [({}, _scrapes)]
    yield "kata_agent_threads", "gauge", [({}, int(stat[17]))]
    yield "kata_agent_total_time", "gauge", [({}, (int(stat[11]) + int(stat[12])) / _TICKS)]
    yield "kata_agent_total_vm", "gauge", [({}, int(stat[20]))]
    yield "kata_agent_total_rss", "gauge", [({}, int(stat[21]) * _PAGE)]
    yield "kata_agent_proc_status", "gauge", [
        ({"item": key.lower()}, int(value.split()[0]) * 1024)
        for key, value in status.items() if value.endswith("kB")]
    yield "kata_agent_proc_stat", "gauge", [({"item": name}, int(stat[index]) / _TICKS) for name, index in (
        ("utime", 11), ("stime", 12), ("cutime", 13), ("cstime", 14))]
    yield "kata_agent_io_stat", "gauge", [({"item": key}, int(value)) for key, value in io]


def _of_guest():
    load = _lines("/proc/loadavg")[0].split()
    yield "kata_guest_load", "gauge", [({"item": f"load{minutes}"}, float(load[index]))
                                       for index, minutes in enumerate((1, 5, 15))]
    running, _, total = load[3].partition("/")
    yield "kata_guest_tasks", "gauge", [({"item": "cur"}, int(running)), ({"item": "max"}, int(total))]
    yield "kata_guest_cpu_time", "gauge", [
        ({"cpu": "total" if name == "cpu" else name[3:], "item": column}, int(value) / _TICKS)
        for name, *values in (line.split() for line in _lines("/proc/stat") if line.startswith("cpu"))
        for column, value in zip(_CPU_COLUMNS, values)]
    yield "kata_guest_vm_stat", "gauge", [
        ({"item": name}, int(value)) for name, value in (line.split() for line in _lines("/proc/vmstat"))]
    yield "kata_guest_meminfo", "gauge", [
        ({"item": name.lower()}, int(value.split()[0]) * (1024 if value.endswith("kB") else 1))
        for name, value in (line.split(":") for line in _lines("/proc/meminfo"))]
    yield "kata_guest_netdev_stat", "gauge", [
        ({"interface": name.strip(), "item": column}, int(value))
        for name, _, values in (line.partition(":") for line in _lines("/proc/net/dev")[2:])
        for column, value in zip(_NET_COLUMNS, values.split())]
    yield "kata_guest_diskstat", "gauge", [
        ({"disk": row[2], "item": column}, int(value))
        for row in (line.split() for line in _lines("/proc/diskstats"))
        for column, value in zip(_DISK_COLUMNS, row[3:])]
    yield from _filesystems()


def _filesystems():
    from katashim.guest.agent import mounts
    sizes, inodes = [], []
    for mount_point, fstype in mounts.table():
        if fstype in ("ext4", "xfs", "tmpfs", "virtiofs", "overlay", "erofs"):
            try:
                facts = os.statvfs(mount_point)
            except OSError:
                continue        # gone meanwhile, or behind another mount
            labels = {"mountpoint": mount_point, "fstype": fstype}
            sizes += [({**labels, "item": "size"}, facts.f_blocks * facts.f_frsize),
                      ({**labels, "item": "free"}, facts.f_bfree * facts.f_frsize)]
            inodes += [({**labels, "item": "total"}, facts.f_files),
                       ({**labels, "item": "free"}, facts.f_ffree)]
    yield "kata_guest_filesystem_bytes", "gauge", sizes
    yield "kata_guest_filesystem_inodes", "gauge", inodes


def _labels(labels):
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{_escape(value)}"' for key, value in labels.items()) + "}"


def _escape(value):
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _lines(path):
    """The lines of a file; none of one that this kernel does not have."""
    try:
        with open(path) as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []
