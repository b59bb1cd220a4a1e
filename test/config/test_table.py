import re

import pytest

from katashim.config import keys as kinds
from katashim.config.table import ANNOTATIONS, RENAMED, SECTIONS, keys, suggestion
from katashim.config.values import convert


@pytest.mark.parametrize("key", list(keys()), ids=lambda key: key.full_name)
def test_every_row_is_sound(key):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", key.name), "must be a Python attribute"
    assert key.meaning[-1] == "." and len(key.meaning) > 5
    assert set(key.drivers) <= set(kinds.DRIVER_LETTERS)
    if key.type not in (kinds.TABLES, *kinds.LISTS):
        assert convert(key, key.default) == key.default, "its own default must be valid"
    for driver, default in key.by_driver.items():
        assert driver in kinds.DRIVERS and convert(key, default) == default
    for synonym, value in key.synonyms.items():
        assert convert(key, synonym) == value
    if key.allowed_by:
        assert SECTIONS[key.section][key.allowed_by].type == kinds.GLOBS
        assert key.type == kinds.PATH and key.annotation


def test_no_two_rows_share_an_annotation():
    for section, named in ANNOTATIONS.items():
        settings = [key for key in SECTIONS[section].values() if key.annotation]
        assert len({key.annotation for key in settings}) == len(settings)
        assert all(key in named.values() for key in settings)


def test_an_old_name_is_no_name_of_today():
    for (section, old), new in RENAMED.items():
        assert old not in SECTIONS.get(section, ()), f"{old} is a setting"
        assert new.name in SECTIONS[new.section]


def test_katas_renamed_annotations():
    hypervisor = ANNOTATIONS["hypervisor"]
    assert hypervisor["default_max_vcpus"].name == "default_maxvcpus"
    assert hypervisor["blk_logical_sector_size"].name == "block_device_logical_sector_size"
    assert hypervisor["blk_physical_sector_size"].name == "block_device_physical_sector_size"
    assert hypervisor["block_device_num_queues"].name == "num_queues"
    assert hypervisor["block_device_queue_size"].name == "queue_size"
    assert hypervisor["prefetch_files.list"].name == "prefetch_list_path"
    assert hypervisor["cc_init_data"].name == "initdata"
    assert ANNOTATIONS["runtime"]["create_container_timeout"].section == "agent"
    assert "sandbox_bind_mounts" not in ANNOTATIONS["runtime"]


def test_defaults_by_driver():
    bridges = SECTIONS["hypervisor"]["default_bridges"]
    assert [bridges.default_for(driver) for driver in ("qemu", "clh", "dragonball")] == [1, 2, 0]
    assert SECTIONS["hypervisor"]["path"].default_for("clh") == "/usr/bin/cloud-hypervisor"


def test_used_by():
    assert SECTIONS["hypervisor"]["accel"].used_by("qemu")
    assert not SECTIONS["hypervisor"]["accel"].used_by("clh")


def test_suggestion():
    assert suggestion("defualt_memory", SECTIONS["hypervisor"]) == "; did you mean default_memory?"
    assert suggestion("zzz", SECTIONS["hypervisor"]) == ""
