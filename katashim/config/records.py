"""What the rest of katashim reads: one frozen Config, whose attributes bear Kata's key names.

``config.hypervisor.default_memory``, ``config.agent.mem_agent.memcg_swap``, ``config.runtime.name``.
The record types are made from the key table, so a key cannot be in one and not in the other.
"""

from collections import namedtuple
from typing import NamedTuple

from katashim.config import keys as kinds
from katashim.config.table import SECTIONS
from katashim.errors import ConfigError, NotFound


class Provenance(NamedTuple):
    """A value and where it came from.

    :ivar where: ``FILE:LINE``, ``annotation NAME``, ``default``, or a sentence.
    :ivar below: the Provenance that this one replaced, or None.
    """

    value: object
    where: str
    below: "Provenance" = None


class InvalidConfig(ConfigError):
    """The configuration cannot be used.

    :ivar problems: one sentence each, with file and line.
    """

    def __init__(self, problems):
        self.problems = tuple(problems)
        head = problems[0]
        if len(problems) > 1:
            head = f"{len(problems)} problems in the configuration:\n  " + "\n  ".join(problems)
        super().__init__(head)


def _record(title, section, **more):
    """The record type of a section: its keys, and `more` fields, all with their defaults."""
    fields = {name: key.default for name, key in SECTIONS[section].items()}
    fields.update(more)
    return namedtuple(title, fields, defaults=fields.values(), module=__name__)


def _row_types():
    """{full name of a TABLES key: the record type of its rows}."""
    return {key.full_name: namedtuple(key.name, key.columns, defaults=[""] * len(key.columns),
                                      module=__name__)
            for section in SECTIONS.values() for key in section.values() if key.type == kinds.TABLES}


ROW_TYPES = _row_types()
Factory = _record("Factory", "hypervisor.factory")
MemAgent = _record("MemAgent", "agent.mem_agent")
Hypervisor = _record("Hypervisor", "hypervisor", name="qemu", factory=Factory())
Agent = _record("Agent", "agent", name="kata", mem_agent=MemAgent())
Runtime = _record("Runtime", "runtime")


class Config(NamedTuple):
    """All settings in force for one sandbox. Frozen; :func:`katashim.config.load` makes it.

    :ivar hypervisor: the selected ``[hypervisor.NAME]``; ``.name`` is the driver's, "qemu".
    :ivar agent: the selected ``[agent.NAME]``.
    :ivar path: the base file that was read.
    :ivar files: every file that was read, in the order in which they were laid over each other.
    :ivar warnings: sentences for the log.
    :ivar sources: {"hypervisor.default_memory": Provenance, ...} of every key.
    """

    hypervisor: Hypervisor
    agent: Agent
    runtime: Runtime
    path: str
    files: tuple
    warnings: tuple
    sources: dict

    def source(self, key):
        """Where a value came from.

        :param key: ``hypervisor.default_memory`` or, with the driver, ``hypervisor.qemu.default_memory``.
        :raises NotFound: there is no such setting.
        """
        for name in (key, _without_table_name(key, self)):
            if name in self.sources:
                return self.sources[name]
        raise NotFound(f"there is no setting {key}")

    def with_values(self, where, values):
        """A Config with some values replaced, which :meth:`source` explains by `where`.

        :param values: {"hypervisor.default_vcpus": 2, ...}
        """
        sources = dict(self.sources)
        for name, value in values.items():
            sources[name] = Provenance(value, where, sources[name])
        return self._replace(sources=sources, **records_of(sources, self.hypervisor.name, self.agent.name))


def records_of(sources, hypervisor_name, agent_name):
    """The three records of a Config, from ``{full name: Provenance}``."""
    def values(section):
        return {name: sources[f"{section}.{name}"].value for name in SECTIONS[section]}

    return {
        "hypervisor": Hypervisor(**values("hypervisor"), name=hypervisor_name,
                                 factory=Factory(**values("hypervisor.factory"))),
        "agent": Agent(**values("agent"), name=agent_name,
                       mem_agent=MemAgent(**values("agent.mem_agent"))),
        "runtime": Runtime(**values("runtime")),
    }


def _without_table_name(key, config):
    """``hypervisor.qemu.path`` as ``hypervisor.path``, when qemu is the selected one."""
    section, _, rest = key.partition(".")
    table, _, name = rest.partition(".")
    selected = {"hypervisor": config.hypervisor.name, "agent": config.agent.name}
    return f"{section}.{name}" if selected.get(section) == table else key
