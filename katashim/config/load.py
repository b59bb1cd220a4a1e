"""Making one Config of files, annotations and defaults.

The layers, each over the one before:

1. the defaults of the key table (Kata's own);
2. for a ``.conf``: the packaged ``defaults/<driver>.conf``, so that a file states only what differs;
   a TOML file of Kata's stands alone, as it does there;
3. the base file, then its drop-ins by name: tables merge, values and lists replace;
4. the pod's annotations;
5. what the host bounds: the number of CPUs, the memory.

Called once per sandbox by the runtime, and by katashim-ctl.
"""

import os
from typing import NamedTuple

from katashim import host as machine
from katashim.config import files, kernel_params, validate
from katashim.config import keys as kinds
from katashim.config.records import Config, InvalidConfig, Provenance, records_of
from katashim.config.table import RENAMED, SECTIONS, suggestion
from katashim.config.values import convert, convert_text

_ANNOTATION_PREFIX = "io.katacontainers.config"

# A packaged default on the right gives way when the file or pod sets the one on the left: a kernel of
# one's own does not want our kernel's modules, an image of one's own is not of our filesystem type.
_GIVES_WAY = {
    "hypervisor.kernel": ("hypervisor.boot_initrd",),
    "hypervisor.image": ("hypervisor.rootfs_type",),
    "hypervisor.initrd": ("hypervisor.image", "hypervisor.boot_initrd", "hypervisor.rootfs_type"),
}
_MAX_VCPUS = {"qemu": 256, "clh": 256, "dragonball": 256, "firecracker": 32, "remote": 32}


class Host(NamedTuple):
    """What bounds a VM here."""

    cpus: int
    memory_mb: int

    @classmethod
    def of_this_machine(cls):
        return cls(cpus=machine.online_cpus(), memory_mb=machine.memory_mb())


def load(path=None, *, annotations=None, env=None, host=None):
    """The configuration in force.

    :param path: the base file that containerd's options name (ConfigPath), or None.
    :param annotations: the sandbox's OCI annotations; those of Kata's configuration are applied.
    :param env: where ``KATA_CONF_FILE`` is looked up, the process's environment by default.
    :param host: a Host, this machine by default.
    :raises InvalidConfig: settings are unknown, of a wrong type, out of range or contradictory;
        `problems` has them all, each with its file and line or annotation.
    :raises NotFound: the named file does not exist.
    """
    base = files.find_base(path, os.environ if env is None else env)
    asked = {name: value for name, value in (annotations or {}).items()
             if name.startswith(_ANNOTATION_PREFIX)}
    drop_ins, warnings = files.drop_ins(base)
    layers = [files.read(name) for name in (base, *drop_ins)]
    packaged, names = None, _selected(layers, asked)
    if base.endswith(".conf"):
        packaged = _packaged_layer(names["hypervisor"], layers[0])
        layers = [packaged] + [layer for layer in layers if layer is not packaged]
        names = _selected(layers[1:], asked, fallback=_selected(layers[:1], {}))

    settings = _lay_over(layers, names, packaged)
    _check_tables_exist(layers, names)
    if asked:
        from katashim.config import annotations as of_pods  # most sandboxes have none
        over, more = of_pods.settings(asked, settings, names)
        warnings += more
        _apply(settings, over, packaged)
    _fill_defaults(settings, names)
    _fit_to_host(settings, names["hypervisor"], host or Host.of_this_machine())
    problems, more = validate.check(settings, names["hypervisor"])
    if problems:
        raise InvalidConfig(problems)
    _add_agent_params(settings, names)
    return Config(**records_of(settings, names["hypervisor"], names["agent"]), path=base,
                  files=tuple(layer.path for layer in layers), warnings=tuple(warnings + more),
                  sources=settings)


# -- which tables ---------------------------------------------------------------------------------
def _selected(layers, annotations, fallback=None):
    """{"hypervisor": "qemu", "agent": "kata"}: named by annotation, by [runtime], or the only table."""
    names = {}
    for kind, default in (("hypervisor", "qemu"), ("agent", "kata")):
        named = annotations.get(f"{_ANNOTATION_PREFIX}.runtime.{kind}_name")
        for layer in layers if not named else ():
            runtime = layer.tree.get("runtime")
            if isinstance(runtime, dict):
                named = runtime.get(f"{kind}_name") or named
        if not isinstance(named, str):                  # absent; a wrong type is reported later
            tables = sorted(set(_tables(layers, kind)))
            named = tables[0] if len(tables) == 1 else (fallback or {}).get(kind)
            if not named and tables:
                several = f"{layers[0].path} has several [{kind}.NAME], {', '.join(tables)}"
                raise InvalidConfig([f"{several}: {kind}_name must name one"])
        names[kind] = kinds.DRIVER_SYNONYMS.get(named, named) or default
    return names


def _tables(layers, kind):
    """The canonical name of each [kind.NAME]."""
    for layer in layers:
        content = layer.tree.get(kind)
        for name, rows in content.items() if isinstance(content, dict) else ():
            if isinstance(rows, dict):
                yield kinds.DRIVER_SYNONYMS.get(name, name)


def _check_tables_exist(layers, names):
    """A hypervisor or agent that is named must have a table, except an agent that nobody describes."""
    for kind, wanted in names.items():
        tables = sorted(set(_tables(layers, kind)))
        if wanted not in tables and (tables or kind == "hypervisor"):
            only = f", only {', '.join(tables)}" if tables else ""
            raise InvalidConfig([
                f"{layers[-1].path}: {kind}_name is {wanted}, and there is no [{kind}.{wanted}]{only}"])


def _packaged_layer(driver, base):
    """The packaged File that goes below `base`, which may be `base` itself."""
    path = os.path.realpath(files.packaged(f"{driver}.conf"))
    if driver not in kinds.DRIVERS or not os.path.exists(path):      # a pod may name anything
        path = os.path.realpath(files.packaged("qemu.conf"))
    return base if path == base.path else files.read(path)


# -- from files to settings -----------------------------------------------------------------------
def _lay_over(layers, names, packaged):
    """{full name: Provenance} of the selected tables; every table of every file is checked."""
    settings, problems = {}, []
    for layer in layers:
        reader = _Reader(layer, names, problems)
        reader.read()
        _apply(settings, reader.found, packaged)
    if problems:
        raise InvalidConfig(problems)
    return settings


def _apply(settings, over, packaged):
    """Lay `over` on `settings`, both {full name: Provenance}."""
    for name, setting in over.items():
        if setting.value and packaged and not setting.where.startswith(packaged.path):
            for other in _GIVES_WAY.get(name, ()):
                if other in settings and settings[other].where.startswith(packaged.path):
                    del settings[other]
    for name, setting in over.items():
        settings[name] = setting._replace(below=settings.get(name))


class _Reader:
    """Reads one file's tree by the key table.

    :ivar found: {full name: Provenance} of the selected tables.
    """

    def __init__(self, file, names, problems):
        self.file, self.names, self.problems = file, names, problems
        self.found = {}
        self._spelled = {}          # full name -> how this file spells it

    def read(self):
        for top, content in self.file.tree.items():
            if top not in ("hypervisor", "agent", "runtime", "factory"):
                self._problem((top,), f"there is no section [{top}]"
                              + suggestion(top, ("hypervisor", "agent", "runtime")))
            elif not isinstance(content, dict):
                self._problem((top,), f"{top} is a section, not a setting")
            elif top in self.names:
                self._named_tables(top, content)
            else:
                self._table(top, (top,), content, keep=True)

    def _named_tables(self, kind, content):
        for name, rows in content.items():
            canonical = kinds.DRIVER_SYNONYMS.get(name, name)
            if not isinstance(rows, dict):
                self._problem((kind, name), f"{name} stands in [{kind}]; it belongs into a table such as "
                                            f"[{kind}.{self.names[kind]}]")
            elif kind == "hypervisor" and canonical not in kinds.DRIVERS:
                self._problem((kind, name), f"there is no hypervisor {name}"
                              + suggestion(name, kinds.DRIVERS))
            else:
                self._table(kind, (kind, name), rows, keep=canonical == self.names[kind])

    def _table(self, section, at, rows, keep):
        """Read one table.

        :param section: its section of the key table, or "factory", which only Go's files have.
        :param at: the names that lead to it in the file.
        :param keep: whether its values count, or are only checked.
        """
        for name, raw in rows.items():
            here = (*at, name)
            if name in SECTIONS.get(section, ()):
                self._setting(SECTIONS[section][name], here, raw, keep, "")
            elif f"{section}.{name}" in SECTIONS and isinstance(raw, dict):
                self._table(f"{section}.{name}", here, raw, keep)
            elif (section, name) in RENAMED:
                self._renamed(RENAMED[section, name], here, raw, keep)
            else:
                known = [*SECTIONS.get(section, ()), *(old for part, old in RENAMED if part == section)]
                self._problem(here, f"[{'.'.join(at)}] has no setting {name}" + suggestion(name, known))

    def _renamed(self, renamed, here, raw, keep):
        try:
            raw = renamed.convert(raw)
        except (TypeError, ValueError) as exc:
            self._problem(here, f"{here[-1]}: {exc}")
        else:
            self._setting(SECTIONS[renamed.section][renamed.name], here, raw, keep, f" ({renamed.note})")

    def _setting(self, key, here, raw, keep, note):
        try:
            value = (convert_text if self.file.textual else convert)(key, raw)
        except ValueError as exc:
            self._problem(here, f"{'.'.join(here)} {exc}")
            return
        earlier = self.found.get(key.full_name)
        if not keep or earlier and value == ():
            return
        if earlier and key.type == kinds.LIST:
            value = earlier.value + value
        elif earlier:
            self._problem(here, f"{here[-1]} is another name of {self._spelled[key.full_name]}, which is "
                                f"set too, at {earlier.where}")
        self._spelled[key.full_name] = here[-1]
        self.found[key.full_name] = Provenance(value, self.file.where(*here) + note)

    def _problem(self, at, text):
        self.problems.append(f"{self.file.where(*at)}: {text}")


# -- from settings to what is in force ------------------------------------------------------------
def _fill_defaults(settings, names):
    for section, keys in SECTIONS.items():
        for name, key in keys.items():
            full = f"{section}.{name}"
            if full not in settings:
                settings[full] = Provenance(key.default_for(names["hypervisor"]), "default")
    for kind, name in names.items():
        full = f"runtime.{kind}_name"
        if settings[full].value != name:
            settings[full] = Provenance(name, f"the only [{kind}.NAME]", settings[full])


def _fit_to_host(settings, driver, host):
    """Settle the numbers that mean "what the host has", as Kata does before it validates."""
    def bound(name, value, why):
        if settings[name].value != value:
            settings[name] = Provenance(value, why, settings[name])

    most = min(host.cpus, _MAX_VCPUS.get(driver, host.cpus))
    wanted = settings["hypervisor.default_maxvcpus"].value
    bound("hypervisor.default_maxvcpus", min(wanted, most) if wanted else most,
          f"the host has {host.cpus} CPUs, {driver} takes {_MAX_VCPUS.get(driver, 'as many')}")
    wanted = settings["hypervisor.default_vcpus"].value
    bound("hypervisor.default_vcpus", 1.0 if wanted == 0 else
          float(host.cpus) if wanted < 0 or wanted > host.cpus else wanted,
          f"the host has {host.cpus} CPUs" if wanted else "0 means 1")
    wanted = settings["hypervisor.default_maxmemory"].value
    bound("hypervisor.default_maxmemory",
          max(min(wanted or host.memory_mb, host.memory_mb),
              0 if wanted else settings["hypervisor.default_memory"].value),
          f"the host has {host.memory_mb} MiB")
    dial = settings["agent.dial_timeout_ms"].value
    if settings["agent.reconnect_timeout_ms"].where == "default" and dial > 3000:
        bound("agent.reconnect_timeout_ms", dial, "dial_timeout_ms, which is longer than the default")


def _add_agent_params(settings, names):
    """The agent's settings travel on the kernel's command line, before the user's words."""
    records = records_of(settings, names["hypervisor"], names["agent"])
    words = kernel_params.agent_params(records["agent"])
    user = settings["hypervisor.kernel_params"]
    if words:
        settings["hypervisor.kernel_params"] = Provenance(
            kernel_params.merge_params(words, user.value), f"the agent's settings, then {user.where}", user)

