"""The key table: every setting by section and name, and what Kata's older files call them.

Called by the loader, the annotations, and katashim-ctl.
"""

from typing import NamedTuple

from katashim.config.agent_keys import AGENT, MEM_AGENT
from katashim.config.hypervisor_keys import FACTORY, HYPERVISOR
from katashim.config.keys import U32
from katashim.config.runtime_keys import RUNTIME

# {section: {name: Key}}, in the order in which people want to read them.
SECTIONS = {
    "hypervisor": {key.name: key for key in HYPERVISOR},
    "hypervisor.factory": {key.name: key for key in FACTORY},
    "agent": {key.name: key for key in AGENT},
    "agent.mem_agent": {key.name: key for key in MEM_AGENT},
    "runtime": {key.name: key for key in RUNTIME},
}

# {section: {annotation: Key}}: what io.katacontainers.config.<section>.<annotation> sets.
ANNOTATIONS = {
    section: {key.annotation: key for key in keys.values() if key.annotation}
    for section, keys in SECTIONS.items()}
# Kata has this setting in [agent.NAME] and its annotation under runtime.
ANNOTATIONS["runtime"]["create_container_timeout"] = SECTIONS["agent"]["create_container_timeout"]


def keys():
    """Every Key, in the table's order."""
    for section in SECTIONS.values():
        yield from section.values()


# -- other spellings ------------------------------------------------------------------------------
class Renamed(NamedTuple):
    """How an older name (Kata's Go runtime, or an earlier release) is understood.

    :ivar section, name: the setting it is now.
    :ivar convert: ``old value -> new value``; raises TypeError or ValueError for a wrong old one.
    :ivar note: added to where the value came from.
    """

    section: str
    name: str
    convert: object
    note: str


def _same(value):
    return value


def _seconds_to_ms(value):
    if isinstance(value, (bool, float)):
        raise TypeError("wants an integer, in seconds")
    seconds = int(value)
    if not 0 <= seconds * 1000 <= U32:
        raise ValueError(f"{seconds} is out of range")
    return str(seconds * 1000) if isinstance(value, str) else seconds * 1000


def _log_level(value):
    """Cloud Hypervisor's number of -v options, as a level's name."""
    levels = ("warn", "info", "debug", "trace")
    if not 0 <= int(value) < len(levels):
        raise ValueError(f"{value} is not one of 0, 1, 2, 3")
    return levels[int(value)]


def _guest_pull(value):
    if value not in (True, False, "true", "false"):
        raise ValueError("wants true or false")
    return ["force_guest_pull"] if value in (True, "true") else []


# {(section, old name): Renamed}. Go's dial_timeout is the whole time to reach the agent, in seconds;
# that is reconnect_timeout_ms here, where dial_timeout_ms is the pause between two attempts.
RENAMED = {
    ("hypervisor", "seccompsandbox"): Renamed("hypervisor", "seccomp_sandbox", _same, "as seccompsandbox"),
    ("hypervisor", "hypervisor_loglevel"):
        Renamed("hypervisor", "log_level", _log_level, "as hypervisor_loglevel"),
    ("hypervisor", "dbg_monitor_socket"):
        Renamed("hypervisor", "extra_monitor_socket", _same, "as dbg_monitor_socket"),
    ("hypervisor", "remote_hypervisor_socket"):
        Renamed("hypervisor", "hypervisor_socket", _same, "as remote_hypervisor_socket"),
    ("hypervisor", "remote_hypervisor_timeout"):
        Renamed("hypervisor", "hypervisor_timeout", _same, "as remote_hypervisor_timeout"),
    ("agent", "dial_timeout"):
        Renamed("agent", "reconnect_timeout_ms", _seconds_to_ms, "as dial_timeout, in seconds"),
    ("agent", "cdh_api_timeout"):
        Renamed("agent", "cdh_api_timeout_ms", _seconds_to_ms, "as cdh_api_timeout, in seconds"),
    ("runtime", "create_container_timeout"):
        Renamed("agent", "create_container_timeout", _same, "in [runtime]"),
    ("runtime", "guest_selinux_label"):
        Renamed("hypervisor", "selinux_label", _same, "as guest_selinux_label in [runtime]"),
    ("runtime", "experimental_force_guest_pull"):
        Renamed("runtime", "experimental", _guest_pull, "as experimental_force_guest_pull"),
    **{("factory", name): Renamed("hypervisor.factory", name, _same, "in [factory]")
       for name in SECTIONS["hypervisor.factory"]},
}


def suggestion(name, known):
    """``"; did you mean X?"`` for the nearest of `known`, or "" when none is near."""
    import difflib  # 3 ms, and only an error needs it
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
