import os
import socket
import stat
from pathlib import Path

import pytest
from guest_files import GuestFiles, served

from katashim.errors import AgentError, FailedPrecondition, NotFound, ResourceExhausted, Unsupported
from katashim.resources import copyfs


@pytest.fixture
def guest(tmp_path):
    (tmp_path / "guest").mkdir()
    files = GuestFiles(tmp_path / "guest")
    with served(files, tmp_path / "agent.sock") as agent:
        files.agent = agent
        yield files


@pytest.mark.parametrize("size", [0, 1, copyfs.PIECE_BYTES, copyfs.PIECE_BYTES + 1, 3 * copyfs.PIECE_BYTES])
def test_a_file_arrives_whole_in_pieces(guest, tmp_path, size):
    source = tmp_path / "hosts"
    source.write_bytes(os.urandom(size))
    os.chown(source, 12, 34)
    source.chmod(0o640)
    there = guest.path(copyfs.copy_in(guest.agent, str(source), "c1-hosts"))
    info = os.stat(there)
    assert Path(there).read_bytes() == source.read_bytes()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (12, 34, 0o640)
    assert len(guest.calls) == max(1, -(-size // copyfs.PIECE_BYTES))
    assert max(len(call.data) for call in guest.calls) <= copyfs.PIECE_BYTES


def test_a_directory_arrives_with_its_links(guest, tmp_path):
    source = tmp_path / "config"
    (source / "..2024").mkdir(parents=True, mode=0o710)
    (source / "..2024/key").write_text("value")
    (source / "..data").symlink_to("..2024")
    (source / "key").symlink_to("..data/key")
    (source / "empty").mkdir()
    (tmp_path / "alias").symlink_to(source)
    there = guest.path(copyfs.copy_in(guest.agent, str(tmp_path / "alias"), "c1-config"))
    assert sorted(os.listdir(there)) == ["..2024", "..data", "empty", "key"]
    assert os.readlink(there + "/..data") == "..2024"
    assert Path(there, "key").read_text() == "value"
    assert stat.S_IMODE(os.stat(there + "/..2024").st_mode) == 0o710


def test_names_that_the_agents_temporary_files_would_overwrite(guest, tmp_path):
    for name in ("a.conf", "a.tmp", "a.yaml"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    there = guest.path(copyfs.copy_in(guest.agent, str(tmp_path / "d"), "d"))
    assert {name: Path(there, name).read_text() for name in os.listdir(there)} == {
        name: name for name in ("a.conf", "a.tmp", "a.yaml")}


def test_what_is_no_file_is_refused(guest, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Unsupported, match="fifo is a FIFO, which cannot be copied"):
        copyfs.copy_in(guest.agent, str(tmp_path / "fifo"), "x")
    (tmp_path / "d").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "d/socket"))
        with pytest.raises(Unsupported, match="d/socket is a socket"):
            copyfs.copy_in(guest.agent, str(tmp_path / "d"), "x")
    with pytest.raises(Unsupported, match="/dev/null is a character device"):
        copyfs.copy_in(guest.agent, "/dev/null", "x")
    with pytest.raises(NotFound, match="cannot copy /no/such into the guest: No such file"):
        copyfs.copy_in(guest.agent, "/no/such", "x")


def test_limits_are_named(guest, tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    for number in range(5):
        (tmp_path / f"d/{number}").write_bytes(bytes(300))
    monkeypatch.setattr(copyfs, "MAX_ENTRIES", 5)
    with pytest.raises(ResourceExhausted, match="more than 5 files.*shared_fs = virtio-fs"):
        copyfs.copy_in(guest.agent, str(tmp_path / "d"), "x")
    with open(tmp_path / "large", "wb") as large:
        large.truncate(copyfs.MAX_BYTES + 1)
    calls = len(guest.calls)
    with pytest.raises(ResourceExhausted, match="larger than 64 MiB"):
        copyfs.copy_in(guest.agent, str(tmp_path / "large"), "x")
    assert len(guest.calls) == calls


def test_a_file_that_shrinks_is_no_half_copy(guest, tmp_path, monkeypatch):
    source = tmp_path / "log"
    source.write_bytes(bytes(copyfs.PIECE_BYTES + 10))
    first = guest.CopyFile

    def shrink_then_copy(request, context):
        os.truncate(source, 5)
        first(request, context)

    monkeypatch.setattr(guest, "CopyFile", shrink_then_copy)
    with served(guest, tmp_path / "second.sock") as agent, \
            pytest.raises(FailedPrecondition, match="log became shorter"):
        copyfs.copy_in(agent, str(source), "log")
    assert not os.path.exists(guest.path("/run/kata-containers/shared/containers/log"))


def test_the_agents_refusal_comes_through(guest, tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(AgentError, match="outside of the shared directory"):
        copyfs.copy_in(guest.agent, str(tmp_path / "f"), "../../etc/passwd")
