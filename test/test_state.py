"""katashim.state: ids that are safe as names, and the file that tells of a sandbox."""

import json
import os
import threading

import pytest

from katashim import state
from katashim.errors import FailedPrecondition, InvalidArgument, KatashimError, NotFound


@pytest.mark.parametrize("identifier", ["a", "0", "a.b_c-d", "A" * 128, "k8s.io", "e3b0c44298fc1c149afbf4c8"])
def test_ids(identifier):
    assert state.check_id(identifier) == identifier


@pytest.mark.parametrize("identifier", ["", ".", "..", "../x", "a/b", "-a", "_a", ".a", "a b", "a\n", "a\0", "é", "a" * 129,
                                        "²"])
def test_what_is_no_id(identifier):
    with pytest.raises(InvalidArgument, match="container id .* is not valid"):
        state.check_id(identifier, "container id")


def test_the_directory_of_a_sandbox(monkeypatch):
    monkeypatch.setattr(state, "RUN_ROOT", "/run/elsewhere")
    assert state.run_dir("s1") == "/run/elsewhere/s1"
    with pytest.raises(InvalidArgument):
        state.run_dir("..")


def test_what_is_written_is_read(tmp_path):
    state.write(str(tmp_path), {"id": "s1", "containers": []})
    assert state.read(str(tmp_path)) == {"version": state.VERSION, "id": "s1", "containers": []}
    assert os.listdir(tmp_path) == ["state.json"]


def test_there_is_none(tmp_path):
    with pytest.raises(NotFound, match="no sandbox state at"):
        state.read(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "nonsense"])
def test_what_is_no_json(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(FailedPrecondition, match="is not JSON"):
        state.read(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", "7", '"x"', "null", '{"version": "one"}', "{}"])
def test_what_is_no_state(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(FailedPrecondition, match="is no sandbox state of katashim's"):
        state.read(str(tmp_path))


def test_a_newer_format_is_refused(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"version": state.VERSION + 1}))
    with pytest.raises(FailedPrecondition, match="use the newer one"):
        state.read(str(tmp_path))


def test_a_reader_never_sees_half_a_record(tmp_path):
    state.write(str(tmp_path), {"n": -1, "text": ""})
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            state.write(str(tmp_path), {"n": number, "text": "x" * (number % 5000)})
    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [state.read(str(tmp_path)) for _ in range(300)]
    finally:
        stop.set()
        writer.join()
    assert all(len(record["text"]) == max(record["n"], 0) % 5000 for record in seen)
    assert [record["n"] for record in seen] == sorted(record["n"] for record in seen)


def test_a_directory_that_is_gone(tmp_path):
    with pytest.raises(KatashimError, match="cannot write .*: No such file"):
        state.write(str(tmp_path / "none"), {})


def test_a_disk_that_is_full_leaves_the_old_record(tmp_path, monkeypatch):
    state.write(str(tmp_path), {"n": 1})
    monkeypatch.setattr(state.os, "rename", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(KatashimError, match="No space left"):
        state.write(str(tmp_path), {"n": 2})
    monkeypatch.undo()
    assert state.read(str(tmp_path))["n"] == 1
