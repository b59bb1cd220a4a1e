"""ConfigObj's own validator with defaults/configspec judges .conf files as katashim does."""

import configobj
import pytest
from configobj.validate import Validator

from katashim.config import InvalidConfig, files, load
from katashim.config import keys as kinds
from katashim.config.table import SECTIONS, keys

GUEST = "kernel = /k\nimage = /i"


def validated(text):
    """(the validated ConfigObj, True or the validator's report)."""
    conf = configobj.ConfigObj(text.split("\n"), configspec=files.packaged("configspec"), interpolation=False)
    return conf, conf.validate(Validator(), preserve_errors=True)


def test_the_shipped_file_is_valid_and_gives_the_same_values(disk):
    with open(files.packaged("qemu.conf"), encoding="utf-8") as file:
        conf, verdict = validated(file.read())
    assert verdict is True
    config = load(env={})
    tables = {"hypervisor": conf["hypervisor"]["qemu"], "agent": conf["agent"]["kata"],
              "runtime": conf["runtime"], "hypervisor.factory": conf["hypervisor"]["qemu"]["factory"],
              "agent.mem_agent": conf["agent"]["kata"]["mem_agent"]}
    compared = 0
    for key in keys():
        source = config.sources[key.full_name]
        while source.where.startswith(("the host", "0 means")):
            source = source.below
        if key.type == kinds.TABLES or key.by_driver:           # are sections there, have one default there
            continue
        value = tables[key.section][key.name]
        assert (tuple(value) if isinstance(value, list) else value) == source.value, key.full_name
        compared += 1
    assert compared > 150


def test_every_key_is_in_the_spec():
    spec = configobj.ConfigObj(files.packaged("configspec"), list_values=False, interpolation=False,
                               _inspec=True)
    tables = {"hypervisor": spec["hypervisor"]["__many__"], "agent": spec["agent"]["__many__"],
              "runtime": spec["runtime"], "hypervisor.factory": spec["hypervisor"]["__many__"]["factory"],
              "agent.mem_agent": spec["agent"]["__many__"]["mem_agent"]}
    for section, table in tables.items():
        nested = {name.rpartition(".")[2] for name in SECTIONS if name.startswith(section + ".")}
        assert set(table) - nested == set(SECTIONS[section])


@pytest.mark.parametrize(("section", "name", "text"), [
    ("hypervisor", "default_memory", "512"), ("hypervisor", "default_memory", "lots"),
    ("hypervisor", "default_memory", "0"), ("hypervisor", "default_memory", "-1"),
    ("hypervisor", "default_memory", "1.5"), ("hypervisor", "default_vcpus", "0.5"),
    ("hypervisor", "default_vcpus", "x"), ("hypervisor", "boot_timeout_s", "0.5"),
    ("hypervisor", "boot_timeout_s", "30"), ("hypervisor", "accel", "tcg"), ("hypervisor", "accel", "fast"),
    ("hypervisor", "block_device_driver", "nvdimm"), ("hypervisor", "network_queues", "256"),
    ("hypervisor", "network_queues", "257"), ("hypervisor", "enable_debug", "on"),
    ("hypervisor", "enable_debug", "maybe"), ("hypervisor", "virtio_fs_extra_args", "a, b"),
    ("hypervisor", "virtio_fs_extra_args", "a"), ("agent", "create_container_timeout", "60"),
    ("agent", "create_container_timeout", "0"), ("runtime", "log_level", "debug"),
    ("runtime", "log_level", "shout"),
    ("runtime", "internetworking_model", "tcfilter"), ("runtime", "internetworking_model", "bridged"),
    ("runtime", "static_sandbox_default_workload_mem", "4294967296"),
])
def test_both_judge_alike(disk, section, name, text):
    header = {"hypervisor": "[hypervisor]\n[[qemu]]\n", "agent": "[agent]\n[[kata]]\n",
              "runtime": "[runtime]\n"}
    conf = f"{header[section]}{name} = {text}\n"
    parsed, verdict = validated(conf)
    if verdict is True:
        value = {"hypervisor": lambda: parsed["hypervisor"]["qemu"], "agent": lambda: parsed["agent"]["kata"],
                 "runtime": lambda: parsed["runtime"]}[section]()[name]
        key = SECTIONS[section][name]
        expected = tuple(value) if isinstance(value, list) else key.synonyms.get(value, value)
        assert disk.load("a.conf", conf).source(f"{section}.{name}").value == expected
    else:
        with pytest.raises(InvalidConfig, match=name):
            disk.load("a.conf", conf)
