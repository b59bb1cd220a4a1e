import pytest

from katashim.config import Agent, Hypervisor, InvalidConfig, Runtime
from katashim.config.records import Factory, MemAgent
from katashim.config.table import SECTIONS
from katashim.errors import INVALID_ARGUMENT


@pytest.mark.parametrize(("record", "section", "more"), [
    (Hypervisor, "hypervisor", ["name", "factory"]), (Factory, "hypervisor.factory", []),
    (Agent, "agent", ["name", "mem_agent"]), (MemAgent, "agent.mem_agent", []), (Runtime, "runtime", [])])
def test_records_have_the_tables_keys_and_defaults(record, section, more):
    assert list(record._fields) == [*SECTIONS[section], *more]
    assert all(getattr(record(), name) == key.default for name, key in SECTIONS[section].items())


def test_a_record_can_be_made_for_a_driver_alone():
    assert Hypervisor(kernel="/k").name == "qemu"
    with pytest.raises(TypeError):
        Hypervisor(kernal="/k")


def test_invalid_config_tells_one_problem_plainly_and_many_as_a_list():
    assert str(InvalidConfig(["a:1: b"])) == "a:1: b"
    many = InvalidConfig(["a:1: b", "a:2: c"])
    assert str(many) == "2 problems in the configuration:\n  a:1: b\n  a:2: c"
    assert many.problems == ("a:1: b", "a:2: c") and many.code == INVALID_ARGUMENT
