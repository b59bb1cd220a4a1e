"""The agent's settings: words of the kernel's command line, then two environment variables.

The words are the Kata agent's (``agent.log=debug``). Words that are not the agent's are other people's; a
value of ours that cannot be read ends the agent at start-up, as upstream does. Called by main.py.
"""

import os

LOG_LEVELS = {"fatal": 0, "panic": 0, "critical": 0, "error": 1, "warn": 2, "warning": 2, "info": 3,
              "debug": 4, "trace": 5}


class BadSetting(ValueError):
    """A word of the command line has an impossible value."""


class Settings:
    """What the agent was told. The attributes are the words without ``agent.``.

    :ivar server_addr: ``vsock://-1:1024`` or ``unix://PATH``.
    :ivar log: a level out of LOG_LEVELS. :ivar log_vport: vsock port of the log stream, 0 = none.
    :ivar debug_console_vport: vsock port of the debug console, 0 = none, None = on the guest's console.
    :ivar hotplug_timeout: seconds to wait for a device. :ivar container_pipe_size: bytes, 0 = the kernel's.
    :ivar unified_cgroups: whether PID 1 mounts cgroup2 (else version 1).
    """

    def __init__(self):
        self.server_addr = "vsock://-1:1024"
        self.log = LOG_LEVELS["info"]
        self.log_vport = 0
        self.debug_console = False
        self.debug_console_vport = 0
        self.devmode = False
        self.hotplug_timeout = 3.0
        self.container_pipe_size = 0
        self.unified_cgroups = False
        self.console = ""


def parse(cmdline, environment=()):
    """Settings from the words of `cmdline` (str) and the variables of `environment` (a mapping).

    :raises BadSetting: names the word.
    """
    settings = Settings()
    for word in cmdline.split():
        key, equals, value = word.partition("=")
        if key in _WORDS and bool(equals) == _WORDS[key][0]:
            _WORDS[key][1](settings, word, value)
    environment = dict(environment)
    settings.server_addr = environment.get("KATA_AGENT_SERVER_ADDR", settings.server_addr)
    if "KATA_AGENT_LOG_LEVEL" in environment:
        _log(settings, "KATA_AGENT_LOG_LEVEL", environment["KATA_AGENT_LOG_LEVEL"])
    return settings


def from_kernel():
    """Settings from /proc/cmdline and the environment."""
    with open("/proc/cmdline") as file:
        return parse(file.read(), os.environ)


def _integer(word, value):
    try:
        return int(value)
    except ValueError as exc:
        raise BadSetting(f"{word}: {value!r} is not a number") from exc


def _set(name, convert):
    def take(settings, word, value):
        setattr(settings, name, convert(word, value))
    return take


def _positive(name, convert=_integer):
    """Values that are not above 0 are passed over, as upstream does."""
    def take(settings, word, value):
        number = convert(word, value)
        if number > 0:
            setattr(settings, name, number)
    return take


def _log(settings, word, value):
    if value not in LOG_LEVELS:
        raise BadSetting(f"{word}: there is no log level {value!r}")
    settings.log = LOG_LEVELS[value]


def _pipe_size(settings, word, value):
    size = _integer(word, value)
    if size < 0:
        raise BadSetting(f"{word}: a pipe of negative size")
    settings.container_pipe_size = size


def _cgroup_no_v1(settings, word, value):
    settings.unified_cgroups |= value == "all"


def _unified(settings, word, value):
    settings.unified_cgroups |= _is_true(value)


def _is_true(value):
    return value == "true" or value.lstrip("-").isdigit() and int(value) != 0


# word: (whether it has a value, what it does)
_WORDS = {
    "agent.server_addr": (True, _set("server_addr", lambda word, value: value)),
    "agent.log": (True, _log),
    "agent.log_vport": (True, _positive("log_vport")),
    "agent.debug_console": (False, _set("debug_console", lambda word, value: True)),
    "agent.debug_console_vport": (True, _positive("debug_console_vport")),
    "agent.devmode": (False, _set("devmode", lambda word, value: True)),
    "agent.hotplug_timeout": (True, _positive("hotplug_timeout")),
    "agent.container_pipe_size": (True, _pipe_size),
    "cgroup_no_v1": (True, _cgroup_no_v1),
    "systemd.unified_cgroup_hierarchy": (True, _unified),
    "console": (True, _set("console", lambda word, value: value)),
}
