"""The kernel's command line as the agent reads it."""

import pytest

from katashim.guest.agent import settings


def test_the_defaults():
    chosen = settings.parse("quiet root=/dev/vda console=ttyS0")
    assert chosen.server_addr == "vsock://-1:1024"
    assert (chosen.log, chosen.log_vport, chosen.debug_console) == (settings.LOG_LEVELS["info"], 0, False)
    assert (chosen.hotplug_timeout, chosen.container_pipe_size, chosen.unified_cgroups) == (3.0, 0, False)
    assert chosen.console == "ttyS0"


def test_words_that_are_ours():
    chosen = settings.parse(
        "agent.log=debug agent.log_vport=1025 agent.debug_console agent.debug_console_vport=1026 "
        "agent.hotplug_timeout=7 agent.container_pipe_size=65536 agent.server_addr=unix:///x")
    assert (chosen.log, chosen.log_vport) == (settings.LOG_LEVELS["debug"], 1025)
    assert (chosen.debug_console, chosen.debug_console_vport) == (True, 1026)
    assert (chosen.hotplug_timeout, chosen.container_pipe_size, chosen.server_addr) == (7, 65536, "unix:///x")


@pytest.mark.parametrize("words", [
    "cgroup_no_v1=all", "systemd.unified_cgroup_hierarchy=1", "systemd.unified_cgroup_hierarchy=true"])
def test_cgroup2_by_either_word(words):
    assert settings.parse(words).unified_cgroups


@pytest.mark.parametrize("words", [
    "cgroup_no_v1=memory", "systemd.unified_cgroup_hierarchy=0", "systemd.unified_cgroup_hierarchy=false"])
def test_no_cgroup2(words):
    assert not settings.parse(words).unified_cgroups


def test_a_flag_is_a_bare_word_and_an_option_has_a_value():
    chosen = settings.parse("agent.debug_console=1 agent.log_vport")
    assert (chosen.debug_console, chosen.log_vport) == (False, 0)


def test_the_last_word_counts():
    assert settings.parse("agent.log=debug agent.log=error").log == settings.LOG_LEVELS["error"]


def test_values_out_of_range_are_passed_over():
    chosen = settings.parse("agent.hotplug_timeout=0 agent.log_vport=-1")
    assert (chosen.hotplug_timeout, chosen.log_vport) == (3.0, 0)


@pytest.mark.parametrize("word", ["agent.log=loud", "agent.log_vport=x", "agent.container_pipe_size=-1"])
def test_impossible_values_end_the_agent_and_are_named(word):
    with pytest.raises(settings.BadSetting, match=word.partition("=")[0]):
        settings.parse(word)


def test_the_environment_comes_last():
    environment = {"KATA_AGENT_SERVER_ADDR": "unix:///y", "KATA_AGENT_LOG_LEVEL": "trace"}
    chosen = settings.parse("agent.server_addr=unix:///x agent.log=info", environment)
    assert (chosen.server_addr, chosen.log) == ("unix:///y", settings.LOG_LEVELS["trace"])
