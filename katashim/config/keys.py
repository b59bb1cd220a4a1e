"""What a setting is: the record behind every row of the key table, and the lookups on the table.

The rows stand in hypervisor_keys.py, agent_keys.py and runtime_keys.py. All else is made from them:
the records that the rest of katashim reads (records.py), the checks (values.py), the ConfigObj
configspec, the commented `defaults/qemu.conf`, `docs/configuration.md` and the answers of
``katashim-ctl config explain``.

Names, types and defaults are Kata's (its configuration files of release 4.1, runtime-rs and Go);
the keys that only katashim has are marked `ours`.
"""

from types import MappingProxyType
from typing import NamedTuple

# The types of a setting.
BOOL = "boolean"
INT = "integer"
FLOAT = "number"
TEXT = "string"
CHOICE = "choice"               # a string, one of Key.choices
PATH = "path"                   # an absolute path, or empty
LIST = "list of strings"
GLOBS = "list of globs"         # absolute path patterns, as glob(3)
REGEXES = "list of regexes"
TABLES = "list of tables"       # [[double.brackets]] in TOML; each row is a record of its own

LISTS = (LIST, GLOBS, REGEXES)

U32 = 2 ** 32 - 1
U64 = 2 ** 64 - 1

DRIVER_LETTERS = {
    "Q": "qemu", "C": "clh", "F": "firecracker", "D": "dragonball", "R": "remote", "O": "openvmm"}
FAKE = "fake"                   # of katashim.drivers.fake, for tests; it ignores most settings
DRIVERS = (*DRIVER_LETTERS.values(), FAKE)

# Other names for a driver's table that Kata's own files use or used.
DRIVER_SYNONYMS = {"cloud-hypervisor": "clh"}


class Key(NamedTuple):
    """One setting.

    :ivar section: "hypervisor", "agent", "runtime", or a sub-table such as "agent.mem_agent".
    :ivar default: what a TOML file that does not name the key gets, as in Kata. `by_driver` overrides it.
    :ivar meaning: one or two sentences for people.
    :ivar low, high: the range of a number, both inclusive, None for no limit.
    :ivar choices: the values of a CHOICE; `synonyms` maps other spellings onto them.
    :ivar drivers: letters of DRIVER_LETTERS: which drivers use a hypervisor's setting.
    :ivar done: katashim acts on it. False: it is accepted, and a warning names it.
    :ivar annotation: its name below ``io.katacontainers.config.<section>.``, "" when it has none.
    :ivar allowed_by: the list of globs that an annotation's value must match.
    :ivar must_exist: an annotation's value must be an existing file.
    """

    section: str
    group: str
    name: str
    type: str
    default: object
    meaning: str
    low: float = None
    high: float = None
    choices: tuple = ()
    synonyms: dict = MappingProxyType({})
    drivers: str = "QCFDRO"
    done: bool = False
    ours: bool = False
    annotation: str = ""
    allowed_by: str = ""
    must_exist: bool = False
    by_driver: dict = MappingProxyType({})
    columns: tuple = ()

    @property
    def full_name(self):
        return f"{self.section}.{self.name}"

    def default_for(self, driver):
        """The default when `driver` ("qemu", ...) is the hypervisor."""
        return self.by_driver.get(driver, self.default)

    def used_by(self, driver):
        """Whether `driver` ("qemu", ...) has a use for this setting."""
        return driver == FAKE or any(DRIVER_LETTERS[letter] == driver for letter in self.drivers)


# -- how a row is written -------------------------------------------------------------------------
def flag(name, meaning, default=False, **more):
    return dict(name=name, type=BOOL, default=default, meaning=meaning, **more)


def number(name, default, meaning, low=0, high=U32, **more):
    return dict(name=name, type=INT, default=default, meaning=meaning, low=low, high=high, **more)


def real(name, default, meaning, **more):
    return dict(name=name, type=FLOAT, default=default, meaning=meaning, **more)


def text(name, meaning, default="", **more):
    return dict(name=name, type=TEXT, default=default, meaning=meaning, **more)


def path(name, meaning, default="", **more):
    return dict(name=name, type=PATH, default=default, meaning=meaning, **more)


def choice(name, default, choices, meaning, **more):
    return dict(name=name, type=CHOICE, default=default, choices=tuple(choices.split()),
                meaning=meaning, **more)


def words(name, meaning, default=(), type=LIST, **more):
    return dict(name=name, type=type, default=default, meaning=meaning, **more)


def tables(name, columns, meaning, **more):
    return dict(name=name, type=TABLES, default=(), columns=tuple(columns.split()), meaning=meaning, **more)


def section(name, groups):
    """Make Keys of rows.

    :param name: the section, "hypervisor".
    :param groups: {heading: [row, ...]}; a row is what the functions above return. In a row,
        ``annotation=True`` means an annotation of the key's own name.
    """
    keys = []
    for heading, rows in groups.items():
        for row in rows:
            if row.get("annotation") is True:
                row["annotation"] = row["name"]
            keys.append(Key(section=name, group=heading, **row))
    return tuple(keys)
