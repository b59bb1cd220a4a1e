"""The files that are made from the key table, so that they cannot disagree with it.

    defaults/configspec       the contract of a .conf file, for ConfigObj's validator
    defaults/qemu.conf        every setting that works with QEMU, explained; ours are active
    docs/configuration.md     the tables between its two marks

``python -m katashim.ctl.configdoc`` writes them anew; test/ctl/test_configdoc.py fails while one is
not current. The texts of a single setting (``katashim-ctl config explain``) are here too.
"""

import os
import textwrap

from katashim.config import keys as kinds
from katashim.config.table import RENAMED, SECTIONS
from katashim.config.values import range_text

# What our configuration files set, other than Kata's defaults: {driver: {section: {name: value}}}.
SHIPPED = {
    "qemu": {
        "hypervisor": {
            "kernel": "/var/lib/katashim/guest/vmlinux",
            "image": "/var/lib/katashim/guest/rootfs.img",
            "boot_initrd": "/var/lib/katashim/guest/initrd.img",
            "rootfs_type": "erofs",
            "kernel_params": "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all",
            "default_memory": 2048,
            "overhead_memory": 192,
            "shared_fs": "virtio-fs",
            "virtio_fs_cache": "auto",
            "enable_annotations": ("enable_iommu", "kernel_params", "kernel_verity_params", "default_vcpus",
                                   "default_memory"),
        },
        "runtime": {
            "hypervisor_name": "qemu",
            "agent_name": "kata",
            "disable_guest_seccomp": True,
            "sandbox_cgroup_only": True,
            "static_sandbox_resource_mgmt": True,
        },
    },
}
_TABLES = {"hypervisor": "[[{driver}]]", "hypervisor.factory": "[[[factory]]]", "agent": "[[kata]]",
           "agent.mem_agent": "[[[mem_agent]]]"}
_MARKS = ("<!-- the key table begins -->", "<!-- the key table ends -->")


# -- one setting ----------------------------------------------------------------------------------
def type_text(key):
    """``"integer, 1 to 65536"``, ``"one of auto, kvm, tcg"``."""
    if key.type == kinds.CHOICE:
        return "one of " + ", ".join(key.choices)
    if key.high is not None and key.high >= kinds.U32:      # what the wire can carry is no news to people
        return f"{key.type}, at least {key.low}" if key.low else key.type
    return ", ".join(filter(None, (key.type, range_text(key))))


def value_text(key, value):
    """A value as it is written in a ``.conf`` file."""
    if key.type == kinds.BOOL:
        return "true" if value else "false"
    if key.type in kinds.LISTS:
        return ", ".join(quoted(item) for item in value) or ","
    if key.type in (kinds.INT, kinds.FLOAT):
        return f"{value:g}" if key.type == kinds.FLOAT else str(value)
    return quoted(value)


def quoted(text):
    """A string as it is written in a ``.conf`` file, in quotes where ConfigObj needs them."""
    if not text or text != text.strip() or any(char in text for char in ",#\"'"):
        return f"'{text}'" if '"' in text else f'"{text}"'
    return text


def other_names(key):
    """The older names of a setting: [("agent", "dial_timeout"), ...]."""
    return [old for old, new in RENAMED.items() if (new.section, new.name) == (key.section, key.name)]


# -- defaults/configspec --------------------------------------------------------------------------
def configspec():
    lines = ["# The contract of katashim's .conf files, for ConfigObj's validator: type, range and default of",
             "# each setting. Made from the key table by `python -m katashim.ctl.configdoc`; do not edit.", ""]
    for section, header in (("hypervisor", "[hypervisor]\n[[__many__]]"), ("agent", "[agent]\n[[__many__]]"),
                            ("runtime", "[runtime]")):
        lines.append(header)
        subsections = []
        for key in SECTIONS[section].values():
            if key.type == kinds.TABLES:
                subsections.append(_tables_spec(key, depth=header.count("[[") + 2))
            else:
                lines += [*_comment(key.meaning), f"{key.name} = {check_text(key)}"]
        for name, keys in SECTIONS.items():
            if name.startswith(section + "."):
                subsections.append("\n".join(
                    [_TABLES[name], *(line for key in keys.values()
                                      for line in (*_comment(key.meaning), f"{key.name} = {check_text(key)}"))]))
        lines += [*subsections, ""]
    return "\n".join(lines)


def check_text(key):
    """A setting's check in configspec's language."""
    default = key.default
    if key.type == kinds.BOOL:
        return f"boolean(default={value_text(key, default)})"
    if key.type in (kinds.INT, kinds.FLOAT):
        limits = "".join(f"{word}={limit}, " for word, limit in (("min", key.low), ("max", key.high))
                         if limit is not None)
        return f"{'integer' if key.type == kinds.INT else 'float'}({limits}default={default})"
    if key.type in kinds.LISTS:
        return "force_list(default=list())"
    if key.type == kinds.CHOICE:
        options = dict.fromkeys([*key.choices, *key.synonyms, default])
        return f"option({', '.join(_spec_quoted(option) for option in options)}, default={_spec_quoted(default)})"
    return f"string(default={_spec_quoted(default)})"


def _spec_quoted(text):
    return f'"{text}"'


def _tables_spec(key, depth):
    def title(name, level):
        return "[" * level + name + "]" * level
    return "\n".join([*_comment(key.meaning), title(key.name, depth), title("__many__", depth + 1),
                      *(f'{column} = string(default="")' for column in key.columns)])


# -- defaults/<driver>.conf -----------------------------------------------------------------------
def conf(driver):
    """The commented configuration file of a driver."""
    lines = [f"# katashim's settings for the {driver} driver, and the packaged defaults of every .conf file.",
             "#",
             *_comment("Do not edit this file, it is replaced by upgrades. To change a setting, write it into "
                       "/etc/kata-containers/katashim/configuration.conf or into a file of "
                       "/etc/kata-containers/katashim/config.d/, below the same section headings; what stands "
                       "there is laid over this file. A line that begins with `#name =` shows a default; "
                       "`katashim-ctl config explain NAME` tells more, and where the value in force comes from."),
             ""]
    for section, headers in (("hypervisor", ["[hypervisor]", f"[[{driver}]]"]), ("agent", ["[agent]", "[[kata]]"]),
                             ("agent.mem_agent", ["[[[mem_agent]]]"]), ("runtime", ["[runtime]"])):
        lines += headers
        lines += _conf_settings(driver, section)
    return "\n".join(lines)


def _conf_settings(driver, section):
    shipped = SHIPPED[driver].get(section, {})
    group = None
    idle = {key.allowed_by for key in SECTIONS[section].values() if not key.done or not key.used_by(driver)}
    for key in SECTIONS[section].values():
        if not key.done or not key.used_by(driver) or key.name in idle:
            continue
        if key.group != group:
            group = key.group
            yield from ("", f"# == {group} " + "=" * (94 - len(group)))
        yield ""
        yield from _comment(key.meaning)
        yield f"# ({type_text(key)})"
        if key.name in shipped:
            yield f"{key.name} = {value_text(key, shipped[key.name])}"
        else:
            yield f"#{key.name} = {value_text(key, key.default_for(driver))}"
    yield ""


def _comment(text):
    return textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="# ", break_long_words=False,
                         break_on_hyphens=False)


# -- docs/configuration.md ------------------------------------------------------------------------
def tables():
    """The key table in Markdown."""
    out = []
    for section, keys in SECTIONS.items():
        table = {"hypervisor": "hypervisor.NAME", "agent": "agent.NAME"}.get(section, section)
        table = table.replace("hypervisor.factory", "hypervisor.NAME.factory")
        out.append(f"### [{table.replace('agent.mem_agent', 'agent.NAME.mem_agent')}]\n")
        group = None
        for key in keys.values():
            if key.group != group:
                group = key.group
                out += [f"\n**{group}**\n", "| Setting | Type | Default | Meaning |", "|---|---|---|---|"]
            out.append(_row(key))
        out.append("")
    return "\n".join(out)


def _row(key):
    kata = key.default_for("qemu")
    default = value_text(key, kata) if kata not in ((), "") else ""
    shipped = SHIPPED["qemu"].get(key.section, {}).get(key.name)
    if shipped is not None:
        default = f"{_code(value_text(key, shipped))} in .conf files" + (
            f", {_code(default)} in Kata's" if default else ", none in Kata's")
    else:
        default = _code(default)
    notes = []
    if key.ours:
        notes.append("katashim's own")
    if key.section == "hypervisor" and len(key.drivers) < len(kinds.DRIVERS):
        notes.append("for " + ", ".join(kinds.DRIVER_LETTERS[letter] for letter in key.drivers))
    if key.annotation:
        notes.append("annotation" + ("" if key.annotation == key.name else f" `{key.annotation}`"))
    notes += [f"formerly `{name}` in [{section}]" for section, name in other_names(key)]
    if not key.done:
        notes.append("**not implemented yet**")
    meaning = key.meaning + (f" ({'; '.join(notes)})" if notes else "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (
        f"`{key.name}`", type_text(key), default, meaning)) + " |"


def _code(text):
    return f"`{text}`" if text else ""


def with_tables(markdown):
    """The document with the text between its marks made anew."""
    before, _, rest = markdown.partition(_MARKS[0])
    after = rest.partition(_MARKS[1])[2]
    return f"{before}{_MARKS[0]}\n\n{tables()}\n{_MARKS[1]}{after}"


def generated(root):
    """{path: text} of all the files that this module makes, below the source tree `root`."""
    document = f"{root}/docs/configuration.md"
    with open(document, encoding="utf-8") as file:
        markdown = file.read()
    return {f"{root}/defaults/configspec": configspec(), document: with_tables(markdown),
            **{f"{root}/defaults/{driver}.conf": conf(driver) for driver in SHIPPED}}


def main():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for path, text in generated(root).items():
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
