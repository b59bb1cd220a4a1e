"""katashim.undo: the stack, its journal on disk, and what a later process makes of that."""

import json
import os
import subprocess
import sys

import pytest

from katashim import undo
from katashim.errors import KatashimError


class Things:
    """A world with things in it that can be acquired and released."""

    def __init__(self):
        self.there, self.released, self.stuck = set(), [], set()

    def acquire(self, stack, name, kind="thing"):
        entry = stack.push(kind, name=name)
        self.there.add(name)
        return entry

    def release(self, name, **more):
        self.released.append(name)
        if name in self.stuck:
            raise KatashimError(f"{name} is stuck")
        self.there.discard(name)

    @property
    def releases(self):
        return {"thing": self.release, "other": self.release}


@pytest.fixture
def things():
    return Things()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "journal")


@pytest.fixture
def stack(things, path):
    stack = undo.Undo(path, things.releases, header={"pid": 7})
    yield stack
    stack.close()


def living(path):
    return [(kind, args) for _, kind, args in undo.read(path)[1]]


# -- the stack ------------------------------------------------------------------------------------
def test_unwinding_goes_newest_first_and_forgets(stack, things):
    for name in "abc":
        things.acquire(stack, name)
    assert stack.unwind() == []
    assert things.released == ["c", "b", "a"] and things.there == set()
    assert stack.unwind() == [] and things.released == ["c", "b", "a"]


def test_an_error_does_not_stop_the_unwinding_and_stays_in_the_journal(stack, things, path):
    for name in "abc":
        things.acquire(stack, name)
    things.stuck.add("b")
    (entry, error), = stack.unwind()
    assert entry.args == {"name": "b"} and "b is stuck" in str(error)
    assert things.released == ["c", "b", "a"]
    assert living(path) == [("thing", {"name": "b"})]


def test_a_bug_in_a_release_is_not_swallowed(path):
    def broken():
        raise ZeroDivisionError
    stack = undo.Undo(path, {"broken": broken})
    stack.push("broken")
    with pytest.raises(ZeroDivisionError):
        stack.unwind()


def test_releasing_one_thing_takes_it_off(stack, things, path):
    first, second = things.acquire(stack, "a"), things.acquire(stack, "b")
    first.release()
    assert things.there == {"b"} and living(path) == [("thing", {"name": "b"})]
    second.forget()
    second.forget()
    assert living(path) == [] and things.there == {"b"} and len(stack) == 0


def test_a_release_that_fails_leaves_the_entry_for_another_try(stack, things):
    entry = things.acquire(stack, "a")
    things.stuck.add("a")
    with pytest.raises(KatashimError, match="a is stuck"):
        entry.release()
    assert len(stack) == 1
    things.stuck.clear()
    entry.release()
    assert things.there == set() and len(stack) == 0


def test_a_scope_unwinds_what_was_pushed_inside_it_only(stack, things):
    things.acquire(stack, "outer")
    with pytest.raises(ValueError), stack.scope():
        things.acquire(stack, "inner")
        raise ValueError
    assert things.there == {"outer"}
    with stack.scope():
        things.acquire(stack, "kept")
    assert things.there == {"outer", "kept"}


def test_an_unknown_kind_is_refused_before_anything_is_written(stack, path):
    with pytest.raises(KeyError, match="no release is known"):
        stack.push("unicorn")
    assert living(path) == [] and len(stack) == 0


def test_a_call_is_released_and_is_not_in_the_journal(stack, path):
    called = []
    stack.call("calling", called.append, 1)
    assert living(path) == [] and stack.entries() == ["calling"]
    assert stack.unwind() == [] and called == [1]


def test_an_empty_stack_is_true(stack):
    assert stack and len(stack) == 0


def test_releases_are_called_through_run(things, path):
    seen = []

    def run(function, args, what):
        seen.append(what)
        function(**args)
    stack = undo.Undo(path, things.releases, run=run)
    things.acquire(stack, "a")
    things.acquire(stack.child("c1"), "b")
    stack.unwind()
    assert seen == ["releasing thing name=b", "releasing thing name=a"]


# -- children -------------------------------------------------------------------------------------
def test_a_child_unwinds_alone_and_at_its_place(stack, things, path):
    things.acquire(stack, "a")
    child = stack.child("c1")
    things.acquire(child, "b")
    things.acquire(stack, "c")
    things.acquire(child, "d")
    assert stack.entries() == ["thing name=a", "thing name=b", "thing name=d", "thing name=c"]
    other = stack.child("c2")
    things.acquire(other, "e")
    assert other.finish() == [] and things.there == set("abcd")
    assert [args["name"] for _, args in living(path)] == ["a", "b", "c", "d"]
    stack.unwind()
    assert things.released == ["e", "c", "d", "b", "a"]


def test_what_a_child_cannot_release_is_reported_through_its_parent(stack, things, path):
    things.acquire(stack.child("c1"), "b")
    things.stuck.add("b")
    (_, error), = stack.unwind()
    assert "stuck" in str(error) and living(path) == [("thing", {"name": "b"})]


def test_children_of_children_are_in_one_journal(stack, things, path):
    things.acquire(stack.child("c1").child("volume"), "b")
    assert living(path) == [("thing", {"name": "b"})]
    stack.unwind()
    assert living(path) == []


def test_a_child_is_finished_once_its_parent_was_unwound(stack, things):
    child = stack.child("c1")
    things.acquire(child, "b")
    stack.unwind()
    assert child.finish() == [] and things.released == ["b"]


def test_a_child_may_be_finished_by_what_its_parent_releases(stack, things):
    child = stack.child("c1")
    things.acquire(child, "a")
    stack.call("finishing", child.finish)
    assert stack.unwind() == [] and len(stack) == 0 and things.released == ["a"]


def test_two_greenlets_of_the_daemon_take_turns():
    """A Delete and the teardown of its sandbox: each thing is released once, newest first."""
    script = '''
from katashim import green
green.patch()
import gevent
from katashim import undo
released = []
def release(name):
    released.append(name + " begins")
    gevent.sleep(0.01)
    released.append(name)
stack = undo.Undo(releases={"thing": release})
child = stack.child("c1")
for name in "ab":
    child.push("thing", name=name)
stack.push("thing", name="c")
both = [gevent.spawn(child.finish), gevent.spawn(stack.unwind)]
gevent.joinall(both, raise_error=True)
print([each.value for each in both], len(stack), *released, sep=", ")
'''
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True)
    lines = done.stdout.strip().split(", ")
    assert lines[:3] == ["[[]", "[]]", "0"]
    assert sorted(lines[3:]) == ["a", "a begins", "b", "b begins", "c", "c begins"]
    assert lines.index("b") < lines.index("a begins")


# -- the journal ----------------------------------------------------------------------------------
def test_what_is_pushed_is_on_disk_before_push_returns(stack, path):
    entry = stack.push("thing", name="a", pid=0)
    assert living(path) == [("thing", {"name": "a", "pid": 0})]
    entry.update(pid=42)
    assert living(path) == [("thing", {"name": "a", "pid": 42})]
    assert repr(entry) == "thing name=a pid=42"


def test_the_header_says_who_wrote_it(stack, path):
    assert undo.read(path)[0] == {"v": 1, "pid": 7}


def test_replay_releases_newest_first_what_a_dead_process_left(stack, things, path):
    for name in "abc":
        things.acquire(stack, name)
    things.acquire(stack, "d").forget()
    stack.close()
    assert undo.replay(path, things.releases) == []
    assert things.released == ["c", "b", "a"]


def test_replay_goes_on_after_errors_and_tells_them(stack, things, path):
    for name in "abc":
        things.acquire(stack, name)
    things.acquire(stack, "d", kind="other")
    things.stuck.add("b")
    stack.close()
    failed = undo.replay(path, {"thing": things.release})
    assert [(what, str(error)) for what, error in failed] == [
        ("other name=d", "this version knows no kind 'other'"), ("thing name=b", "b is stuck")]
    assert things.there == {"b", "d"}


@pytest.mark.parametrize("cut", range(2, 40, 6))
def test_a_line_cut_off_by_the_writers_death_is_passed_over(stack, things, path, cut):
    things.acquire(stack, "a")
    things.acquire(stack, "b")
    stack.close()
    with open(path, "rb+") as file:
        file.truncate(os.path.getsize(path) - cut)
    assert living(path) == [("thing", {"name": "a"})]
    assert undo.replay(path, things.releases) == []


def test_without_a_path_nothing_is_written(things, tmp_path):
    stack = undo.Undo(releases=things.releases)
    things.acquire(stack, "a")
    stack.unwind()
    assert things.released == ["a"] and os.listdir(tmp_path) == []


def test_a_journal_that_cannot_be_written_stops_the_acquiring(stack, things, path, monkeypatch):
    monkeypatch.setattr(undo.os, "write", _disk_full)
    with pytest.raises(KatashimError, match=f"cannot write the journal {path}: No space left"):
        things.acquire(stack, "a")
    monkeypatch.undo()
    assert things.there == set() and len(stack) == 0 and living(path) == []


def test_a_full_disk_does_not_keep_things_from_being_released(stack, things, monkeypatch):
    things.acquire(stack, "a")
    things.acquire(stack, "b")
    monkeypatch.setattr(undo.os, "write", _disk_full)
    assert stack.unwind() == []
    monkeypatch.undo()
    assert things.there == set()


def test_half_a_line_is_taken_back(stack, things, path, monkeypatch):
    write, pieces = os.write, []

    def fill_up(fd, data):
        pieces.append(data)
        return write(fd, data[:9]) if len(pieces) == 1 else _disk_full(fd, data)
    monkeypatch.setattr(undo.os, "write", fill_up)
    with pytest.raises(KatashimError, match="No space left"):
        things.acquire(stack, "a")
    monkeypatch.undo()
    things.acquire(stack, "b")
    assert living(path) == [("thing", {"name": "b"})]


def _disk_full(fd, data):
    raise OSError(28, "No space left on device")


def test_a_short_write_is_completed(stack, things, path, monkeypatch):
    write = os.write
    monkeypatch.setattr(undo.os, "write", lambda fd, data: write(fd, data[:5]))
    things.acquire(stack, "a")
    monkeypatch.undo()
    assert living(path) == [("thing", {"name": "a"})]


def test_a_long_life_does_not_make_a_long_journal(stack, things, path):
    things.acquire(stack, "first")
    child = stack.child("c1")
    things.acquire(child, "second")
    for number in range(6000):
        things.acquire(stack, str(number)).release()
    assert os.path.getsize(path) < 300_000
    assert [args["name"] for _, args in living(path)] == ["first", "second"]
    third = things.acquire(stack, "third")
    third.update(pid=3)
    assert undo.read(path)[0] == {"v": 1, "pid": 7}
    stack.unwind()
    assert things.there == set() and living(path) == []


def test_a_stack_of_many_living_things_is_not_written_anew_at_each_push(stack, things, path):
    for number in range(5000):
        things.acquire(stack, f"{number:080}")
    size = os.path.getsize(path)
    inode = os.stat(path).st_ino
    things.acquire(stack, "one more")
    assert os.stat(path).st_ino == inode and os.path.getsize(path) > size
    assert len(living(path)) == 5001


def test_the_journal_is_lines_of_json(stack, things, path):
    things.acquire(stack, "a").update(pid=3)
    stack.unwind()
    with open(path) as file:
        assert [json.loads(line).get("do") for line in file] == [None, "push", "update", "drop"]
