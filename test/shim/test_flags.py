"""katashim.shim.flags: Go's flag syntax, and ids that are safe in paths."""

import pytest

from katashim.errors import InvalidArgument
from katashim.shim import flags

CONTAINERD = ["-namespace", "k8s.io", "-address", "/run/containerd/containerd.sock",
              "-publish-binary", "/usr/bin/containerd", "-id", "c1"]


def test_what_containerd_writes():
    found = flags.parse([*CONTAINERD, "-debug", "start"])
    assert (found.namespace, found.address, found.id) == ("k8s.io", "/run/containerd/containerd.sock", "c1")
    assert found.publish_binary == "/usr/bin/containerd"
    assert found.debug and found.action == "start" and found.bundle == ""


def test_delete_with_a_bundle():
    found = flags.parse([*CONTAINERD, "-bundle", "/run/b", "delete"])
    assert (found.action, found.bundle, found.debug) == ("delete", "/run/b", False)


@pytest.mark.parametrize("words", [["-id", "x1"], ["-id=x1"], ["--id", "x1"], ["--id=x1"]])
def test_a_value_can_be_written_in_four_ways(words):
    assert flags.parse(words).id == "x1"


def test_a_value_may_look_like_a_flag_or_be_empty():
    found = flags.parse(["-address", "", "-id", "-debug", "start"])
    assert (found.address, found.id, found.debug, found.action) == ("", "-debug", False, "start")


@pytest.mark.parametrize("word, value", [
    ("-debug", True), ("--debug", True), ("-debug=true", True), ("-debug=1", True), ("-debug=T", True),
    ("-debug=false", False), ("-debug=0", False), ("-debug=FALSE", False)])
def test_a_switch_takes_its_value_only_after_an_equals_sign(word, value):
    found = flags.parse([word, "start"])
    assert found.debug is value and found.action == "start"


def test_what_follows_the_action_is_not_looked_at():
    found = flags.parse(["-id", "x1", "start", "-id", "x2", "--nonsense"])
    assert (found.id, found.action) == ("x1", "start")


def test_two_dashes_end_the_flags():
    assert flags.parse(["-id", "x1", "--", "delete"]).action == "delete"


def test_no_action_is_the_daemon():
    assert flags.parse(CONTAINERD).action == ""


@pytest.mark.parametrize("words, text", [
    (["-v"], "version"), (["--version"], "version"), (["-info"], "info"), (["-h"], "help"), (["-help"], "help")])
def test_the_switches_that_ask(words, text):
    assert getattr(flags.parse(words), text)


@pytest.mark.parametrize("words, text", [
    (["-nonsense"], "unknown flag '-nonsense'"), (["-id"], "flag -id needs a value"),
    (["-debug=maybe"], "cannot be 'maybe'"), (["run"], "unknown action 'run'"), (["-"], "unknown action '-'")])
def test_what_is_wrong_is_named(words, text):
    with pytest.raises(InvalidArgument, match=text):
        flags.parse(words)


@pytest.mark.parametrize("value", ["a1", "c1", "a.b", "a-b", "a_b", "4f" * 32, "x" * 76, "a.."])
def test_ids_that_are_good(value):
    assert flags.check_id(value, "id") == value


@pytest.mark.parametrize("value", ["", "a", "..", "../x", "a/b", "/a", ".ab", "-ab", "_ab", "a b", "a\nb",
                                   "a\0b", "\u00e4b", "x" * 77])
def test_ids_that_are_not(value):
    with pytest.raises(InvalidArgument, match="id"):
        flags.check_id(value, "id")
