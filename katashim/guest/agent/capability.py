"""Capabilities of a process about to be executed: names to numbers (linux/capability.h), and setting them.

Called by enter.py.
"""

from katashim.guest.agent import linux

_NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)
_NUMBERS = {f"CAP_{name}": number for number, name in enumerate(_NAMES)}


class Capabilities:
    """The five sets of a process. :param sets: the runtime spec's ``capabilities``; names that the kernel
    does not know are left out, as runtimes do."""

    def __init__(self, sets):
        self._sets = {name: [_NUMBERS[item] for item in sets.get(name, ()) if item in _NUMBERS]
                      for name in ("bounding", "effective", "inheritable", "permitted", "ambient")}

    def limit(self):
        """Drop what is not in the bounding set. Needs CAP_SETPCAP, so it comes before the user changes."""
        for number in range(len(_NAMES)):
            if number not in self._sets["bounding"]:
                try:
                    linux.prctl(linux.PR_CAPBSET_DROP, number)
                except OSError:
                    return      # the kernel knows no more
        linux.prctl(linux.PR_SET_KEEPCAPS, 1)

    def apply(self):
        """Take on the other sets, after the user has changed."""
        linux.set_capabilities(*(sum(1 << number for number in self._sets[name])
                                 for name in ("effective", "permitted", "inheritable")))
        linux.prctl(linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_CLEAR_ALL)
        for number in self._sets["ambient"]:
            linux.prctl(linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_RAISE, number)
