"""The pod's say: ``io.katacontainers.config.{hypervisor,agent,runtime}.*`` annotations.

Those of the hypervisor are refused unless ``enable_annotations`` allows them. Kata matches its
regular expressions anywhere in the name, so that "path" allows "jailer_path" too; here one must match
the whole name. And where runtime-rs ignores an annotation that is not enabled, this is an error, as
in Kata's Go runtime: a pod that asks for something must not run without it and without a word.

Only the sandbox's annotations count; the caller passes no others.
"""

import os
import re

from katashim.config import keys as kinds
from katashim.config.kernel_params import merge_params
from katashim.config.records import InvalidConfig, Provenance
from katashim.config.table import ANNOTATIONS, SECTIONS, suggestion
from katashim.config.values import convert, convert_text
from katashim.errors import InvalidArgument

PREFIX = "io.katacontainers.config."

_UNITS = {"": 20, "b": 0, "k": 10, "kb": 10, "kib": 10, "m": 20, "mb": 20, "mib": 20, "g": 30, "gb": 30,
          "gib": 30, "t": 40, "tb": 40, "tib": 40}
_MAX_PORTS = 16
_MAX_INITDATA_BYTES = 16 << 20


def settings(annotations, known, names):
    """What annotations set.

    :param annotations: {name: text}, those that begin with ``io.katacontainers.config``.
    :param known: {full name: Provenance} of what the files set.
    :param names: the selected tables, {"hypervisor": "qemu", "agent": "kata"}.
    :returns: ({full name: Provenance} to lay over `known`, sentences for the log).
    :raises InvalidConfig: one is unknown, not enabled or has a wrong value.
    """
    pod = _Pod(known, names)
    for name in sorted(annotations):
        if not name.startswith(PREFIX):                 # io.katacontainers.config_path and the like
            pod.warnings.append(f"the annotation {name} is not honoured: the administrator chooses the "
                                "configuration file, by the runtime's options")
            continue
        section, _, suffix = name[len(PREFIX):].partition(".")
        try:
            pod.take(name, section, suffix, annotations[name])
        except (ValueError, InvalidArgument) as exc:
            pod.problems.append(f"annotation {name} {exc}")
    pod.settle_root()
    if pod.problems:
        raise InvalidConfig(pod.problems)
    return pod.found, pod.warnings


class _Pod:
    """Takes one annotation after another."""

    def __init__(self, known, names):
        self.known, self.names = known, names
        self.found, self.problems, self.warnings = {}, [], []

    def take(self, name, section, suffix, text):
        """Check one annotation and note what it sets.

        :raises ValueError: with the rest of a sentence that begins with the annotation's name.
        """
        key = ANNOTATIONS.get(section, {}).get(suffix)
        if section == "hypervisor":
            self._demand_enabled(suffix)
        if key is None:
            raise ValueError(_unknown(section, suffix))
        value = self._value(key, text)
        if key.allowed_by:
            self._demand_allowed(key, value)
        if key.must_exist and not os.path.exists(value):
            raise ValueError(f"names {value}, which does not exist")
        if key.name in ("pcie_root_port", "pcie_switch_port") and value > _MAX_PORTS:
            raise ValueError(f"is {value}, must be {_MAX_PORTS} at most")
        self.found[key.full_name] = Provenance(value, f"annotation {name}")

    def settle_root(self):
        """An annotated image takes the place of a configured initrd, and the other way round."""
        for one, other in (("image", "initrd"), ("initrd", "image")):
            mine, theirs = f"hypervisor.{one}", f"hypervisor.{other}"
            if mine in self.found and theirs not in self.found and self._in_files(theirs):
                self.found[theirs] = Provenance("", f"given way to the {self.found[mine].where}")
        if "hypervisor.initrd" in self.found and self._in_files("hypervisor.boot_initrd"):
            self.found.setdefault("hypervisor.boot_initrd", Provenance(
                "", f"given way to the {self.found['hypervisor.initrd'].where}"))

    def _in_files(self, full_name, default=""):
        """The value that the files give a setting."""
        return self.known[full_name].value if full_name in self.known else default

    def _demand_enabled(self, suffix):
        enabled = self._in_files("hypervisor.enable_annotations", ())
        if not any(re.fullmatch(pattern, suffix) for pattern in enabled):
            table, setting = self.names["hypervisor"], self.known.get("hypervisor.enable_annotations")
            raise ValueError(f'is not enabled: add "{suffix}" to enable_annotations of [hypervisor.{table}]'
                             + (f" ({setting.where})" if setting else ""))

    def _demand_allowed(self, key, value):
        patterns = self._in_files(f"hypervisor.{key.allowed_by}", ())
        if not any(_glob(pattern).fullmatch(value) for pattern in patterns):
            raise ValueError(f"is {value}, which matches none of {key.allowed_by} "
                             f"({', '.join(patterns) or 'empty'})")
        if os.path.normpath(value) != value:
            raise ValueError(f"is {value}, must be a path without . and ..")

    def _value(self, key, text):
        special = _SPECIAL.get(key.full_name)
        if special:
            return special(self, key, text)
        if key.type in kinds.LISTS:
            return convert_text(key, [item.strip() for item in text.split(",") if item.strip()])
        return convert_text(key, text)

    # -- annotations that are not just text for their setting -----------------------------------
    def _kernel_params(self, key, text):
        return merge_params(self._in_files(key.full_name), text)

    def _memory(self, key, text):
        size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
        if not size or size[2].lower() not in _UNITS:
            raise ValueError(f'is "{text}", wants a size such as "2048" (MiB) or "2 GiB"')
        return convert(key, int(float(size[1]) * 2 ** _UNITS[size[2].lower()]) >> 20)

    def _added_arguments(self, key, text):
        added = convert_text(key, [item.strip() for item in text.split(",") if item.strip()])
        return tuple(self._in_files(key.full_name, ())) + added

    def _modules(self, key, text):
        return convert_text(key, [item.strip() for item in text.split(";") if item.strip()])

    def _json_rows(self, key, text):
        import json
        try:
            return convert(key, json.loads(text))
        except json.JSONDecodeError as exc:
            raise ValueError(f"is not JSON: {exc}") from exc

    def _initdata(self, key, text):
        import base64
        import zlib
        try:
            stream = zlib.decompressobj(wbits=31)       # gzip, and never more than we are willing to hold
            raw = stream.decompress(base64.b64decode(text, validate=True), _MAX_INITDATA_BYTES)
            if not stream.eof:
                raise ValueError("is cut off or too long")
            return convert(key, raw.decode())
        except (ValueError, zlib.error) as exc:         # binascii's and Unicode's errors are ValueErrors
            raise ValueError(f"is not base64 of gzip of TOML: {exc}") from exc

    def _policy(self, key, text):
        import base64
        try:
            return convert(key, base64.b64decode(text, validate=True).decode())
        except ValueError as exc:
            raise ValueError(f"is not base64 of text: {exc}") from exc


_SPECIAL = {
    "hypervisor.kernel_params": _Pod._kernel_params,
    "hypervisor.default_memory": _Pod._memory,
    "hypervisor.virtio_fs_extra_args": _Pod._added_arguments,
    "hypervisor.initdata": _Pod._initdata,
    "agent.kernel_modules": _Pod._modules,
    "agent.policy": _Pod._policy,
    "runtime.shared_mounts": _Pod._json_rows,
}


def _unknown(section, suffix):
    """Why there is no such annotation, as the rest of a sentence."""
    if section not in ANNOTATIONS:
        components = ("hypervisor", "agent", "runtime")
        return f"is unknown: there is no component {section}" + suggestion(section, components)
    if suffix in SECTIONS[section]:
        return f"is refused: {suffix} is set in the configuration file only"
    if suffix.endswith("_hash") or suffix == "asset_hash_type":
        return "is refused: katashim does not verify hashes of files"
    return "is unknown" + suggestion(suffix, ANNOTATIONS[section])


def _glob(pattern):
    """glob(3) as a regular expression: ``*`` and ``?`` stay within one component of the path."""
    out, position = "", 0
    while position < len(pattern):
        char = pattern[position]
        closing = pattern.find("]", position + 2) if char == "[" else -1
        if closing > 0:
            inside = pattern[position + 1:closing].replace("\\", "\\\\")
            out += "[^" + inside[1:] + "]" if inside[0] in "!^" else "[" + inside + "]"
            position = closing
        else:
            out += {"*": "[^/]*", "?": "[^/]"}.get(char) or re.escape(char)
        position += 1
    return re.compile(out)
