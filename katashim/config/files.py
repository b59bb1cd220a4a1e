"""Which files make the configuration, and what stands in them, before its meaning is looked at.

Two formats are read: our own ``.conf`` (ConfigObj) and Kata's ``.toml``, by suffix. The result of
both is the same: nested dicts, and the line of each key.
"""

import os
import re
from typing import NamedTuple

from katashim.config.records import InvalidConfig
from katashim.errors import ConfigError, NotFound

OUR_DIRECTORY = "/etc/kata-containers/katashim"

# Where a base file is looked for when nobody names one; the first that exists is taken.
SEARCH_PATH = (
    f"{OUR_DIRECTORY}/configuration.conf",
    f"{OUR_DIRECTORY}/configuration.toml",
    "/etc/kata-containers/runtime-rs/configuration.toml",
    "/etc/kata-containers/configuration.toml",
    "/usr/share/defaults/kata-containers/runtime-rs/configuration.toml",
    "/usr/share/defaults/kata-containers/configuration.toml",
    "/opt/kata/share/defaults/kata-containers/runtime-rs/configuration.toml",
    "/opt/kata/share/defaults/kata-containers/configuration.toml",
)

ENVIRONMENT = "KATA_CONF_FILE"
SUFFIXES = (".conf", ".toml")


class File(NamedTuple):
    """One file that was read.

    :ivar tree: {"hypervisor": {"qemu": {"kernel": "/..."}}, ...} as the parser gave it.
    :ivar lines: {("hypervisor", "qemu", "kernel"): 12, ...}.
    :ivar textual: values are text still (``.conf``), not typed (TOML).
    """

    path: str
    tree: dict
    lines: dict
    textual: bool

    def where(self, *names):
        """``FILE:LINE`` of a setting, or of the nearest thing around it that has a line."""
        while names and names not in self.lines:
            names = names[:-1]
        return f"{self.path}:{self.lines[names]}" if names else self.path


# -- which files ----------------------------------------------------------------------------------
def find_base(path, env):
    """The base file's canonical path.

    :param path: what the caller names (the ConfigPath of CreateTask's options), or None.
    :param env: the environment; ``KATA_CONF_FILE`` there comes first. Kata accepts only its default
        paths in it; here it may be any absolute path that root owns and only root can write.
    :raises NotFound, ConfigError: the named file cannot be used.
    """
    named = env.get(ENVIRONMENT)
    if named:
        return _checked_owner(_existing(named, f", which {ENVIRONMENT} names,"))
    if path:
        return _existing(path)
    for candidate in (*SEARCH_PATH, packaged("qemu.conf")):
        if os.path.exists(candidate):
            return os.path.realpath(candidate)
    raise NotFound(f"there is no configuration: none of {', '.join(SEARCH_PATH)} exists")


def _existing(path, named_by=""):
    if not os.path.isabs(path):
        raise ConfigError(f"the configuration file {path}{named_by} must be an absolute path")
    if not os.path.isfile(path):
        raise NotFound(f"the configuration file {path}{named_by} does not exist")
    return os.path.realpath(path)


def _checked_owner(path):
    status = os.stat(path)
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{ENVIRONMENT} names {path}, which belongs to user {status.st_uid}, not to root")
    if status.st_mode & 0o022:
        raise ConfigError(f"{ENVIRONMENT} names {path}, which others than its owner can write")
    return path


def packaged(name):
    """The path of a file of `defaults/`: in the source tree, or where it is installed."""
    import sys
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    places = (f"{root}/defaults", f"{sys.prefix}/share/katashim/defaults", "/usr/share/katashim/defaults")
    return next((f"{place}/{name}" for place in places if os.path.exists(f"{place}/{name}")),
                f"{places[-1]}/{name}")


def drop_ins(base):
    """The files to lay over `base`, in order, and sentences about those that are passed over.

    They are ``*.conf`` and ``*.toml`` of ``config.d/`` beside the canonical base file, by name. Over
    the packaged defaults, those of ``/etc/kata-containers/katashim/config.d/``.
    """
    directory = OUR_DIRECTORY if base == os.path.realpath(packaged("qemu.conf")) else os.path.dirname(base)
    directory += "/config.d"
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    taken = [f"{directory}/{name}" for name in names
             if name.endswith(SUFFIXES) and not name.startswith(".")]
    passed_over = [f"{directory}/{name} is not read: drop-ins end in .conf or .toml"
                   for name in names if f"{directory}/{name}" not in taken]
    return taken, passed_over


# -- what stands in them --------------------------------------------------------------------------
def read(path):
    """Parse one file, by its suffix.

    :raises InvalidConfig: it is not valid; names the line.
    :raises ConfigError: it cannot be read, or is of neither format.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the configuration file {path}: {exc}") from exc
    if path.endswith(".toml"):
        return _read_toml(path, text)
    if path.endswith(".conf"):
        return _read_conf(path, text)
    raise ConfigError(f"the configuration file {path} must end in .conf or .toml")


def _read_toml(path, text):
    import tomllib  # 3 ms, and a .conf needs none of it

    from katashim.config.lines import toml_lines
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InvalidConfig([_toml_problem(path, str(exc))]) from exc
    return File(path, tree, toml_lines(text), textual=False)


def _toml_problem(path, message):
    """tomllib's words, with its "(at line 3, column 5)" put in front as FILE:LINE."""
    at = re.search(r" \(at line (\d+), column \d+\)", message)
    if not at:
        return f"{path}: {message}"
    return f"{path}:{at[1]}: {message.replace(at[0], '')}"


def _read_conf(path, text):
    import configobj  # 2 ms, and a .toml needs none of it

    from katashim.config.lines import conf_lines
    try:
        parsed = configobj.ConfigObj(text.split("\n"), interpolation=False, list_values=True)
    except configobj.ConfigObjError as exc:
        errors = getattr(exc, "errors", None) or [exc]
        raise InvalidConfig([_conf_problem(path, error) for error in errors]) from exc
    return File(path, parsed.dict(), conf_lines(text), textual=True)


def _conf_problem(path, error):
    """One of ConfigObj's errors as ``FILE:LINE: what: the line``."""
    what = re.sub(r" at line \d+\.?$", "", str(error))
    return f"{path}:{error.line_number}: {what}: {error.line.strip()}"
