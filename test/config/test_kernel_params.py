import pytest
from hypothesis import given
from hypothesis import strategies as st

from katashim.config.kernel_params import agent_params, merge_params, split_params
from katashim.config.records import Agent, MemAgent
from katashim.errors import InvalidArgument

VERITY = 'dm-mod.create="dm-verity,,,ro,0 736328 verity 1 /dev/vda1 /dev/vda2 4096 4096 92041 0 sha256 ab cd"'


@pytest.mark.parametrize(("text", "words"), [
    ("", []),
    ("  a=1\tb  c=2\n", ["a=1", "b", "c=2"]),
    (f"quiet {VERITY} root=/dev/dm-0", ["quiet", VERITY, "root=/dev/dm-0"]),
    ('"a b"=c d', ['"a b"=c', "d"]),
])
def test_split(text, words):
    assert split_params(text) == words


def test_an_open_quote_is_an_error():
    with pytest.raises(InvalidArgument, match="a quote is not closed"):
        split_params('a="b c')


@given(st.lists(st.text('ab="x ', min_size=1).filter(lambda word: word.count('"') % 2 == 0)))
def test_split_loses_nothing(words):
    text = " ".join(words)
    assert "".join(split_params(text)).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(("texts", "merged"), [
    (("a=1 b c=2", "c=3 d"), "a=1 b c=3 d"),
    (("a=1", ""), "a=1"),
    (("console=ttyS0 console=hvc0", "quiet"), "console=ttyS0 console=hvc0 quiet"),
    (("console=ttyS0 x console=hvc0 y", "console=a console=b"), "console=a console=b x y"),
    (("quiet", "quiet"), "quiet"),
    ((f"{VERITY} a", 'dm-mod.create="none at all"'), 'dm-mod.create="none at all" a'),
    (("a=1", "a=2", "a=3 b"), "a=3 b"),
])
def test_merge(texts, merged):
    assert merge_params(*texts) == merged


def test_agent_settings_at_their_default_say_nothing():
    assert agent_params(Agent()) == ""


def test_agent_settings_become_words():
    agent = Agent(enable_debug=True, enable_tracing=True, debug_console_enabled=True,
                  visible_cdi_devices=True, container_pipe_size=4096,
                  launch_process_timeout=6, cdh_api_timeout_ms=60000)
    assert agent_params(agent).split() == [
        "agent.log=debug", "agent.trace=true", "agent.debug_console", "agent.debug_console_vport=1026",
        "agent.visible_cdi_devices=true", "agent.container_pipe_size=4096", "agent.launch_process_timeout=6",
        "agent.cdh_api_timeout=60"]


def test_the_memory_agent_is_told_what_changed_and_only_when_it_runs():
    changed = MemAgent(memcg_swap=True, compact_period_secs=30)
    assert agent_params(Agent(mem_agent=changed)) == ""
    assert agent_params(Agent(mem_agent=changed._replace(mem_agent_enable=True))) == (
        "psi=1 agent.mem_agent_enable=1 agent.mem_agent_compact_period_secs=30 agent.mem_agent_memcg_swap=1")
