"""The builder's layers: whole or absent, made once."""

import os

import pytest

from katashim.errors import DeadlineExceeded
from katashim.guest import cache


def test_a_layer_is_made_once(tmp_path):
    made = []

    def make(path):
        made.append(path)
        with open(os.path.join(path, "f"), "w") as file:
            file.write("x")

    layers = cache.Cache(str(tmp_path))
    first = layers.layer("kernel", "1", make)
    assert layers.layer("kernel", "1", make) == first
    assert len(made) == 1
    assert os.listdir(first) == ["f"]


def test_one_that_fails_is_not_there_and_can_be_tried_again(tmp_path):
    def fail(path):
        with open(os.path.join(path, "half"), "w"):
            raise KeyError

    layers = cache.Cache(str(tmp_path))
    with pytest.raises(KeyError):
        layers.layer("kernel", "1", fail)
    assert os.listdir(layers.layer("kernel", "1", lambda path: None)) == []


def test_what_an_interrupted_build_left_is_in_nobodys_way(tmp_path):
    (tmp_path / "kernel-1.making").mkdir()
    (tmp_path / "kernel-1.making" / "half").write_text("x")
    assert os.listdir(cache.Cache(str(tmp_path)).layer("kernel", "1", lambda path: None)) == []
    assert sorted(os.listdir(tmp_path)) == ["kernel-1", "locks"]


def test_dropping_and_pruning(tmp_path):
    layers = cache.Cache(str(tmp_path))
    for name, key in (("kernel-source", "1"), ("packages", "1"), ("packages", "2")):
        layers.layer(name, key, lambda path: None)
    layers.drop("packages")
    assert sorted(os.listdir(tmp_path)) == ["kernel-source-1", "locks"]
    layers.prune()
    assert sorted(os.listdir(tmp_path)) == ["kernel-source-1", "locks"]
    os.utime(tmp_path / "kernel-source-1", (0, 0))
    layers.prune()
    assert os.listdir(tmp_path) == ["locks"]


def test_two_builds_do_not_make_the_same_layer(tmp_path):
    layers = cache.Cache(str(tmp_path), wait_s=0)

    def make(path):
        layers.layer("other", "1", lambda inner: None)
        with pytest.raises(DeadlineExceeded, match="another guest build that makes the layer kernel-1"):
            layers.layer("kernel", "1", make)

    layers.layer("kernel", "1", make)
    assert sorted(os.listdir(tmp_path)) == ["kernel-1", "locks", "other-1"]


def test_keys_tell_inputs_apart():
    assert cache.key_of({"a": 1, "b": 2}) == cache.key_of({"b": 2, "a": 1})
    assert len({cache.key_of(*given) for given in ((1,), (2,), ("1",), (1, 1), ([1, 1],))}) == 5
