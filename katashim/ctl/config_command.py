"""``katashim-ctl config show|check|explain``: which settings are in force, from where, and are they right."""

import os

from katashim.config import InvalidConfig, keys, load
from katashim.config.table import SECTIONS, suggestion
from katashim.config.validate import missing_files
from katashim.ctl import configdoc, output
from katashim.errors import NotFound

_PREFIX = "io.katacontainers.config."


def add_arguments(parser):
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print the settings in force and where each comes from")
    show.add_argument("--all", action="store_true", help="those at their default too")
    check = actions.add_parser("check", help="is the configuration valid, and does this host have its files?")
    explain = actions.add_parser("explain", help="tell all about one setting")
    explain.add_argument("key", metavar="KEY", help="default_memory, agent.enable_debug, "
                         "hypervisor.qemu.kernel, or an annotation's whole name")
    for action in (show, check, explain):
        output.add_json(action)
        action.add_argument("--config", metavar="PATH", help="the base file, instead of the search path")
        action.add_argument("--annotation", metavar="NAME=VALUE", action="append", default=[],
                            help="as if a pod had it; `hypervisor.default_memory=4096` is short for "
                                 f"{_PREFIX}hypervisor.default_memory=4096")


def main(args):
    return {"show": _show, "check": _check, "explain": _explain}[args.action](args)


def _load(args):
    annotations = {}
    for text in args.annotation:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidConfig([f"--annotation wants NAME=VALUE, not {text}"])
        annotations[name if name.startswith("io.") else _PREFIX + name] = value
    path = os.path.abspath(args.config) if args.config else None
    # A file named here is meant, whatever the environment says.
    return load(path, annotations=annotations, env={} if path else None)


# -- show -----------------------------------------------------------------------------------------
def _show(args):
    config = _load(args)
    output.emit(args, _plain(config), _as_conf(config, args.all))
    return 0


def _plain(config):
    """A Config as plain data."""
    return {
        "path": config.path, "files": list(config.files), "warnings": list(config.warnings),
        "hypervisor": _plain_record(config.hypervisor), "agent": _plain_record(config.agent),
        "runtime": _plain_record(config.runtime),
        "sources": {name: {"value": _plain_record(source.value), "where": source.where}
                    for name, source in config.sources.items()},
    }


def _plain_record(value):
    """A value, a record or a tuple of them as plain data."""
    if hasattr(value, "_asdict"):
        return {name: _plain_record(part) for name, part in value._asdict().items()}
    return [_plain_record(part) for part in value] if isinstance(value, tuple) else value


def _as_conf(config, everything):
    """The settings in force in the ``.conf`` format, each with its place as a comment."""
    titles = {"hypervisor": f"[hypervisor]\n[[{config.hypervisor.name}]]",
              "hypervisor.factory": "[[[factory]]]",
              "agent": f"[agent]\n[[{config.agent.name}]]", "agent.mem_agent": "[[[mem_agent]]]",
              "runtime": "[runtime]"}
    out = [output.paint(f"# {path}", "dim") for path in config.files]
    for section, table in SECTIONS.items():
        chosen = [key for key in table.values()
                  if everything or config.sources[key.full_name].where != "default"]
        rows = [(f"{key.name} = {configdoc.value_text(key, config.sources[key.full_name].value)}",
                 output.paint(f"# {config.sources[key.full_name].where}", "dim"))
                for key in chosen if key.type != keys.TABLES]
        if rows or section in ("hypervisor", "agent", "runtime"):
            out.append("\n" + output.paint(titles[section], "bold"))
        if rows:
            out.append(output.columns(rows))
        out += [_tables_as_conf(key, config.sources[key.full_name])
                for key in chosen if key.type == keys.TABLES]
    return "\n".join([text for text in out if text] + [f"\n# warning: {text}" for text in config.warnings])


def _tables_as_conf(key, source):
    """The rows of a TABLES setting, each a section of its own."""
    depth = 2 if key.section == "runtime" else 3
    lines = [f"{'[' * depth}{key.name}{']' * depth}  {output.paint(f'# {source.where}', 'dim')}"]
    for row in source.value:
        lines.append(f"{'[' * (depth + 1)}{row.name}{']' * (depth + 1)}")
        lines += [f"{column} = {configdoc.quoted(getattr(row, column))}" for column in key.columns]
    return "\n".join(lines) if source.value else ""


# -- check ----------------------------------------------------------------------------------------
def _check(args):
    try:
        config = _load(args)
    except InvalidConfig as exc:
        output.emit(args, {"valid": False, "problems": list(exc.problems), "warnings": [], "files": []},
                    "\n".join(_marked("problem", text, "red") for text in exc.problems))
        return 1
    problems = missing_files(config)
    lines = [f"{config.hypervisor.name} driver, from {', '.join(config.files)}"]
    lines += [_marked("warning", text, "yellow") for text in config.warnings]
    lines += [_marked("problem", text, "red") for text in problems]
    lines += [] if problems else [output.paint("the configuration is valid", "green")]
    output.emit(args, {"valid": not problems, "problems": problems, "warnings": list(config.warnings),
                       "files": list(config.files)}, "\n".join(lines))
    return 1 if problems else 0


def _marked(word, text, colour):
    return f"{output.paint(word, colour)}: {text}"


# -- explain --------------------------------------------------------------------------------------
def _explain(args):
    found = _find(args.key)
    try:
        config, broken = _load(args), None
    except InvalidConfig as exc:        # a setting can be explained while another is wrong
        config, broken = None, exc
    entries = [_entry(key, config) for key in found]
    text = "\n\n".join(_entry_text(entry) for entry in entries)
    if broken:
        text += f"\n\nNo value: {broken.message}"
    output.emit(args, {"settings": entries, "error": broken.message if broken else None}, text)
    return 1 if broken else 0


def _find(asked):
    """The keys that are called `asked`; several when sections share a name.

    :raises NotFound: none is; suggests the nearest.
    """
    every = [key for table in SECTIONS.values() for key in table.values()]
    found = [key for key in every if asked in _names(key)]
    if not found and asked.count(".") > 1:              # hypervisor.qemu.kernel, agent.kata.mem_agent.x
        section, _, name = asked.split(".", 2)
        found = [key for key in every if key.full_name == f"{section}.{name}"]
    if not found:
        known = {name for key in every for name in _names(key)}
        raise NotFound(f"there is no setting {asked}{suggestion(asked, known)}")
    return found


def _names(key):
    """What people may call a setting."""
    names = [key.name, key.full_name, *(name for _, name in configdoc.other_names(key))]
    if key.annotation:
        names.append(f"{_PREFIX}{key.section}.{key.annotation}")
    return names


def _entry(key, config):
    """All about a setting, as plain data."""
    source = config.sources[key.full_name] if config else None
    driver = config.hypervisor.name if config else "qemu"
    entry = {
        "name": key.full_name, "meaning": key.meaning, "type": configdoc.type_text(key),
        "default": _plain_record(key.default_for(driver)),
        "drivers": _drivers(key),
        "implemented": key.done, "katashim_only": key.ours,
        "annotation": f"{_PREFIX}{key.section}.{key.annotation}" if key.annotation else None,
        "formerly": [f"[{section}] {name}" for section, name in configdoc.other_names(key)],
        "value": _plain_record(source.value) if source else None,
        "where": source.where if source else None, "replaced": [],
    }
    while source and source.below:
        source = source.below
        entry["replaced"].append({"value": _plain_record(source.value), "where": source.where})
    return entry


def _drivers(key):
    """The drivers that use a setting; None where drivers have nothing to do with it."""
    if key.section != "hypervisor":
        return None
    return [keys.DRIVER_LETTERS[letter] for letter in key.drivers]


def _entry_text(entry):
    lines = [output.paint(entry["name"], "bold"), f"  {entry['meaning']}", ""]
    rows = [("type", entry["type"]), ("default", _shown(entry["default"]))]
    if entry["where"]:
        rows += [("value", _shown(entry["value"])), ("from", entry["where"])]
        rows += [("replaced", f"{_shown(old['value'])} from {old['where']}") for old in entry["replaced"]]
    if entry["annotation"]:
        rows.append(("annotation", entry["annotation"]))
    if entry["drivers"]:
        rows.append(("drivers", ", ".join(entry["drivers"])))
    rows += [("formerly", name) for name in entry["formerly"]]
    if not entry["implemented"]:
        rows.append(("status", output.paint("not implemented yet, it has no effect", "yellow")))
    return "\n".join(lines) + output.columns([(f"  {name}", text) for name, text in rows])


def _shown(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "(none)"
    return f"{value:g}" if isinstance(value, float) else str(value) or "(empty)"
