"""CopyFile: parts make a file, and no path leads out of the shared directory."""

import os
import stat
from types import SimpleNamespace

import pytest

from katashim.guest.agent import copyfile
from katashim.guest.agent.rpcerror import RpcError


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "shared"
    path.mkdir()
    return str(path)


def request(path, data=b"", **fields):
    given = {"file_size": len(data), "file_mode": stat.S_IFREG | 0o640, "dir_mode": 0o755, "uid": os.getuid(),
             "gid": os.getgid(), "offset": 0, **fields}
    return SimpleNamespace(path=path, data=data, **given)


def test_a_file_in_one_part(base):
    copyfile.copy(request(f"{base}/a/b/c.conf", b"text"), base)
    with open(f"{base}/a/b/c.conf", "rb") as file:
        assert file.read() == b"text"
    assert stat.S_IMODE(os.stat(f"{base}/a/b/c.conf").st_mode) == 0o640
    assert os.listdir(f"{base}/a/b") == ["c.conf"]


def test_a_file_appears_when_its_last_part_has_come(base):
    copyfile.copy(request(f"{base}/f", b"abc", file_size=6), base)
    assert not os.path.exists(f"{base}/f")
    copyfile.copy(request(f"{base}/f", b"def", file_size=6, offset=3), base)
    with open(f"{base}/f", "rb") as file:
        assert file.read() == b"abcdef"


def test_a_first_part_starts_anew(base):
    copyfile.copy(request(f"{base}/f", b"a long text"), base)
    copyfile.copy(request(f"{base}/f", b"short"), base)
    with open(f"{base}/f", "rb") as file:
        assert file.read() == b"short"


def test_an_empty_file(base):
    copyfile.copy(request(f"{base}/empty"), base)
    assert os.stat(f"{base}/empty").st_size == 0


def test_directories_and_links(base):
    copyfile.copy(request(f"{base}/d", file_mode=stat.S_IFDIR | 0o1777), base)
    copyfile.copy(request(f"{base}/d", file_mode=stat.S_IFDIR | 0o700), base)
    copyfile.copy(request(f"{base}/l", b"d/target", file_mode=stat.S_IFLNK | 0o777), base)
    assert stat.S_IMODE(os.stat(f"{base}/d").st_mode) == 0o700
    assert os.readlink(f"{base}/l") == "d/target"


@pytest.mark.parametrize("path", ["/etc/passwd", "{base}/../x", "{base}/a/../../x", "{base}", "{base}/",
                                  "{base}x/y", ""])
def test_paths_outside_are_refused(base, path):
    with pytest.raises(RpcError):
        copyfile.copy(request(path.format(base=base), b"x"), base)
    assert os.listdir(os.path.dirname(base)) == ["shared"]


@pytest.mark.parametrize("target", ["..", "/", "../outside"])
def test_a_link_leads_nowhere_else(base, tmp_path, target):
    (tmp_path / "outside").mkdir()
    os.symlink(target, f"{base}/link")
    try:
        copyfile.copy(request(f"{base}/link/f", b"x"), base)
    except (RpcError, OSError):
        pass        # refusing is as good as writing inside
    assert os.listdir(tmp_path / "outside") == []
    assert not os.path.exists(tmp_path / "f") and not os.path.exists("/f")


def test_a_link_in_place_of_the_file_is_replaced_not_followed(base, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    os.symlink(victim, f"{base}/f")
    os.symlink(victim, f"{base}/f.tmp")
    copyfile.copy(request(f"{base}/f", b"x"), base)
    assert victim.read_text() == "mine"
    assert not os.path.islink(f"{base}/f")
