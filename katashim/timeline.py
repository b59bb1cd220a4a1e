"""When each phase of a sandbox's start began and how long it took.

Written into state.json, attached to errors of bring-up, printed as a waterfall by tools. Times are
milliseconds since the shim was started, so that the shim's own start shows too.
"""

import time

# Field 22 of /proc/<pid>/stat counts clock ticks since boot; CLOCK_BOOTTIME is the same clock.
_TICK_MS = 10


def process_age_ms():
    """How long this process has existed, to the kernel's clock tick (10 ms)."""
    with open("/proc/self/stat", "rb") as stat:
        ticks = int(stat.read().rpartition(b")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) * 1000 - ticks * _TICK_MS


class Timeline:
    """Named phases in the order in which they began.

    :param zero_ms: how long before now the clock started.
    """

    def __init__(self, zero_ms=0.0):
        self._zero = time.monotonic() - zero_ms / 1000
        self._phases = []           # [name, start_ms, duration_ms or None while it runs]

    def now_ms(self):
        return (time.monotonic() - self._zero) * 1000

    def phase(self, name):
        """A context manager that records the block as the phase `name`."""
        return _Phase(self, name)

    def add(self, name, start_ms, end_ms):
        """Record a phase whose ends were seen elsewhere."""
        self._phases.append([name, start_ms, end_ms - start_ms])

    def records(self):
        """``[{"phase", "start_ms", "ms"}]``, ms is None for a phase that has not ended."""
        return [{"phase": name, "start_ms": round(start, 1), "ms": None if ms is None else round(ms, 1)}
                for name, start, ms in sorted(self._phases, key=lambda phase: phase[1])]

    def text(self):
        """One line a phase, for errors and logs."""
        return "\n".join(
            f"{record['start_ms']:9.1f} ms  {record['phase']:<10} "
            + ("not ended" if record["ms"] is None else f"{record['ms']:.1f} ms")
            for record in self.records())


class _Phase:
    def __init__(self, timeline, name):
        self._timeline = timeline
        self._row = [name, 0.0, None]

    def __enter__(self):
        self._row[1] = self._timeline.now_ms()
        self._timeline._phases.append(self._row)
        return self

    def __exit__(self, *error):
        self._row[2] = self._timeline.now_ms() - self._row[1]
        return False
