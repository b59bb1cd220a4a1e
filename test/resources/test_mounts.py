import ctypes
import errno
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from private_mounts import private_mounts

from katashim.errors import FailedPrecondition, InvalidArgument, KatashimError
from katashim.resources import mounts


def tree(base, *names):
    """Directories (names ending in /) and files, each file holding its own name."""
    for name in names:
        path = base / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)


def targets(path):
    return [entry.target for entry in mounts.at_or_below(str(path))]


# -- options and the table ----------------------------------------------------------------------------
@pytest.mark.parametrize("words, flags, propagation, data", [
    ([], 0, 0, ""),
    (["ro", "nosuid", "nodev"], mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV, 0, ""),
    (["ro", "rw"], 0, 0, ""),
    (["rw", "ro"], mounts.MS_RDONLY, 0, ""),
    (["rbind", "rprivate", "ro"], mounts.MS_BIND | mounts.MS_REC | mounts.MS_RDONLY,
     mounts.MS_PRIVATE | mounts.MS_REC, ""),
    (["index=off", "lowerdir=/a:/b", "upperdir=/u"], 0, 0, "index=off,lowerdir=/a:/b,upperdir=/u"),
    (["defaults", "X-containerd.mkdir.path=/x", "x-systemd.after=y", "size=1m"], 0, 0, "size=1m"),
    (["noexec", "exec", "mode=0755"], 0, 0, "mode=0755"),
])
def test_option_words(words, flags, propagation, data):
    assert mounts.parse_options(words) == (flags, propagation, data)


MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
36 35 98:0 /mnt1 /mnt\0402\011x rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue
40 36 0:5 / /mnt\040\134 ro shared:7 - tmpfs a\043b rw,size=1k
"""


def test_table_is_parsed_with_escapes_and_optional_fields():
    proc, ext, tmp = mounts.parse_table(MOUNTINFO)
    assert proc == (22, 27, "0:21", "/", "/proc", ("rw", "relatime"), (), "proc", "proc", ("rw",))
    assert ext.target == "/mnt 2\tx" and ext.tags == ("master:1", "propagate_from:2")
    assert ext.root == "/mnt1" and ext.super_options == ("rw", "errors=continue")
    assert tmp.target == "/mnt \\" and tmp.source == "a#b" and tmp.options == ("ro",)


@pytest.mark.parametrize("line", ["", "22 27 0:21 / /proc rw", "22 27 0:21 / /p rw - proc", "x 27 0:1 / / rw - a b c"])
def test_a_line_that_is_no_mountinfo_is_an_error(line):
    with pytest.raises(KatashimError, match="not a line of mountinfo"):
        mounts._parse_line(line)


def test_the_table_of_this_machine_agrees_with_findmnt():
    found = subprocess.run(["findmnt", "-rno", "ID,TARGET,FSTYPE"], capture_output=True, text=True, check=True)
    theirs = {int(line.split()[0]): line.split()[2] for line in found.stdout.splitlines()}
    assert {entry.id: entry.fstype for entry in mounts.table()} == theirs


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_escapes_round_trip(name):
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\#" else c for c in name)
    assert mounts._unescape(escaped) == name


def test_below_means_names_not_prefixes():
    table = [mounts.Mount(n, 1, "0:1", "/", target, ("rw",), (), "tmpfs", "t", ("rw",))
             for n, target in enumerate(["/run/a", "/run/ab", "/run/a/b", "/run"], start=2)]
    assert {entry.target for entry in mounts.at_or_below("/run/a", table)} == {"/run/a", "/run/a/b"}
    assert len(mounts.at_or_below("/run/a/", table)) == 2
    assert len(mounts.at_or_below("/", table)) == 4


# -- mounting -----------------------------------------------------------------------------------------
@private_mounts
def test_mount_applies_flags_and_data(tmp_path):
    target = str(tmp_path)
    mounts.mount("tmpfs", target, "tmpfs", ["nosuid", "noexec", "size=64k", "mode=0711"])
    entry = mounts.at_or_below(target)[0]
    assert {"nosuid", "noexec"} <= set(entry.options) and "size=64k" in entry.super_options
    assert os.stat(target).st_mode & 0o777 == 0o711


@private_mounts
def test_mount_makes_a_bind_read_only_and_private(tmp_path):
    tree(tmp_path, "source/file", "target/")
    mounts.mount(str(tmp_path / "source"), str(tmp_path / "target"), "bind", ["rbind", "ro", "rprivate"])
    entry = mounts.at_or_below(str(tmp_path / "target"))[0]
    assert "ro" in entry.options and entry.tags == ()
    with pytest.raises(OSError) as failure:
        (tmp_path / "target/file").write_text("x")
    assert failure.value.errno == errno.EROFS


@private_mounts
def test_mount_says_what_failed(tmp_path):
    with pytest.raises(FileNotFoundError, match="mounting overlay on .*/nowhere"):
        mounts.mount("overlay", str(tmp_path / "nowhere"), "overlay", ["lowerdir=/a"])
    with pytest.raises(InvalidArgument, match="the kernel takes 4095"):
        mounts.mount("tmpfs", str(tmp_path), "tmpfs", ["x" * 5000])


@private_mounts
def test_an_overlay_of_more_layers_than_a_page_can_name(tmp_path):
    names = [f"{index:03}-{'l' * 80}" for index in range(60)]
    tree(tmp_path, *(f"{name}/{name[:3]}" for name in names), "target/")
    fds = len(os.listdir("/proc/self/fd"))
    lower = ":".join(str(tmp_path / name) for name in names)
    mounts.mount("overlay", str(tmp_path / "target"), "overlay", ["lowerdir=" + lower])
    assert sorted(os.listdir(tmp_path / "target")) == [name[:3] for name in names]
    assert len(os.listdir("/proc/self/fd")) == fds


# -- binds --------------------------------------------------------------------------------------------
@private_mounts
def test_a_bind_is_read_only_in_every_view_from_its_first_moment(tmp_path):
    tree(tmp_path, "rw/a/", "ro/", "source/file")
    rw, ro = str(tmp_path / "rw"), str(tmp_path / "ro")
    mounts.bind(rw, rw)
    mounts.set_propagation(rw, mounts.MS_SHARED)
    mounts.bind(rw, ro, readonly=True, slave=True)
    mounts.bind(str(tmp_path / "source"), rw + "/a", readonly=True)
    for view in (rw, ro):
        assert os.listdir(view + "/a") == ["file"]
        with pytest.raises(OSError) as failure:
            os.unlink(view + "/a/file")
        assert failure.value.errno == errno.EROFS
    mounts.unmount(rw + "/a")
    assert os.listdir(ro + "/a") == []


@private_mounts
def test_unmounting_a_bind_leaves_the_mounts_of_its_source(tmp_path):
    tree(tmp_path, "source/inner/", "target/")
    inner = str(tmp_path / "source/inner")
    mounts.mount("tmpfs", inner, "tmpfs")                       # in a shared tree, as on a systemd host
    mounts.set_propagation(str(inner), mounts.MS_SHARED)
    for slave in (False, True):
        mounts.bind(str(tmp_path / "source"), str(tmp_path / "target"), recursive=True, slave=slave)
        assert targets(tmp_path / "target") == [str(tmp_path / "target/inner"), str(tmp_path / "target")]
        mounts.unmount_below(str(tmp_path / "target"))
        assert targets(tmp_path / "target") == []
        assert targets(tmp_path / "source") == [inner]


@private_mounts
def test_a_slave_bind_follows_what_is_mounted_later(tmp_path):
    tree(tmp_path, "source/inner/", "follows/", "stays/")
    source = str(tmp_path / "source")
    mounts.bind(source, source)
    mounts.set_propagation(source, mounts.MS_SHARED)
    mounts.bind(source, str(tmp_path / "follows"), slave=True)
    mounts.bind(source, str(tmp_path / "stays"))
    mounts.mount("tmpfs", source + "/inner", "tmpfs")
    assert targets(tmp_path / "follows/inner") == [str(tmp_path / "follows/inner")]
    assert targets(tmp_path / "stays/inner") == []


@private_mounts
def test_a_file_can_be_bound(tmp_path):
    tree(tmp_path, "source", "target")
    mounts.bind(str(tmp_path / "source"), str(tmp_path / "target"), readonly=True)
    assert (tmp_path / "target").read_text() == "source"
    with pytest.raises(FileNotFoundError, match="binding .*/gone to"):
        mounts.bind(str(tmp_path / "gone"), str(tmp_path / "target"))


# -- unmounting ---------------------------------------------------------------------------------------
@private_mounts
def test_unmount_is_idempotent_and_detaches_what_is_in_use(tmp_path):
    tree(tmp_path, "busy/", "link_to/")
    busy = str(tmp_path / "busy")
    assert mounts.unmount(busy) is False
    assert mounts.unmount(str(tmp_path / "never")) is False
    mounts.mount("tmpfs", busy, "tmpfs")
    with open(busy + "/held", "w") as held:
        assert mounts.unmount(busy) is True
        held.write("still works")
    assert targets(busy) == []


@private_mounts
def test_unmount_does_not_follow_a_link(tmp_path):
    tree(tmp_path, "mounted/")
    mounts.mount("tmpfs", str(tmp_path / "mounted"), "tmpfs")
    (tmp_path / "link").symlink_to(tmp_path / "mounted")
    assert mounts.unmount(str(tmp_path / "link")) is False
    assert targets(tmp_path / "mounted") == [str(tmp_path / "mounted")]


@private_mounts
def test_unmount_below_takes_stacked_hidden_and_oddly_named_mounts(tmp_path):
    base = tmp_path / "a b\n#\\"
    tree(base, "x/y/", "z/")
    for target in ("x/y", "x/y", "x", "z", "."):
        mounts.mount("tmpfs", os.path.normpath(str(base / target)), "tmpfs")
        tree(base, "x/y/", "z/") if target == "." else None
    mounts.mount("tmpfs", str(base / "x"), "tmpfs")
    assert len(targets(base)) == 6
    mounts.unmount_below(str(base))
    assert targets(base) == []
    assert sorted(os.listdir(base)) == ["x", "z"]


@private_mounts
def test_mount_points_are_recognised(tmp_path):
    tree(tmp_path, "plain/", "same/", "other/", "file", "bound")
    mounts.bind(str(tmp_path / "plain"), str(tmp_path / "same"))
    mounts.mount("tmpfs", str(tmp_path / "other"), "tmpfs")
    mounts.bind(str(tmp_path / "file"), str(tmp_path / "bound"))
    (tmp_path / "link").symlink_to(tmp_path / "other")
    found = {name: mounts.is_mount_point(str(tmp_path / name))
             for name in ("plain", "same", "other", "file", "bound", "link", "missing", "missing/deeper")}
    assert [name for name, is_one in found.items() if is_one] == ["same", "other", "bound"]


# -- deleting -----------------------------------------------------------------------------------------
def test_delete_a_tree_and_never_what_links_point_to(tmp_path):
    tree(tmp_path, "precious/data", "doomed/a/b/c", "doomed/d")
    (tmp_path / "doomed/link").symlink_to(tmp_path / "precious")
    (tmp_path / "doomed/a/up").symlink_to("../../precious")
    mounts.remove_tree(str(tmp_path / "doomed"))
    assert not (tmp_path / "doomed").exists()
    assert (tmp_path / "precious/data").read_text() == "precious/data"
    mounts.remove_tree(str(tmp_path / "doomed"))
    mounts.remove_tree(str(tmp_path / "no/such"))
    (tmp_path / "alias").symlink_to(tmp_path / "precious")
    mounts.remove_tree(str(tmp_path / "alias"))
    assert os.listdir(tmp_path / "precious") == ["data"]


@pytest.mark.parametrize("path", ["/", "/run", "/run/", "run/x", "", "/run/..", "/a/../b", "//run"])
def test_top_directories_are_never_deleted(path):
    with pytest.raises(InvalidArgument):
        mounts.delete_tree(path)


@private_mounts
@pytest.mark.parametrize("kind", ["bind on the same filesystem", "other filesystem", "file", "the tree itself"])
def test_delete_refuses_to_cross_a_mount(tmp_path, kind):
    tree(tmp_path, "precious/data", "precious_file", "doomed/a/m/", "doomed/a/f")
    at = "doomed/a/m"
    if kind == "other filesystem":
        mounts.mount("tmpfs", str(tmp_path / at), "tmpfs")
        tree(tmp_path, "doomed/a/m/data")
    elif kind == "file":
        at = "doomed/a/f"
        mounts.bind(str(tmp_path / "precious_file"), str(tmp_path / at))
    else:
        at = "doomed" if kind == "the tree itself" else at
        mounts.bind(str(tmp_path / "precious"), str(tmp_path / at))
    with pytest.raises(FailedPrecondition, match=f"refusing to delete .*{at}: something is mounted there"):
        mounts.delete_tree(str(tmp_path / "doomed"))
    assert (tmp_path / "precious/data").exists() and (tmp_path / "precious_file").exists()
    if kind == "other filesystem":
        assert (tmp_path / "doomed/a/m/data").exists()
    mounts.remove_tree(str(tmp_path / "doomed"))
    assert sorted(os.listdir(tmp_path)) == ["precious", "precious_file"]
    assert (tmp_path / "precious/data").read_text() == "precious/data"


@private_mounts
def test_a_mount_that_appears_during_the_deletion_stops_it(tmp_path):
    """The kernel is asked at each directory, so a mount made between the look and the deletion is seen."""
    tree(tmp_path, "precious/data", "doomed/z/", "doomed/a")
    unlink = os.unlink

    def mount_then_unlink(name, **where):
        mounts.bind(str(tmp_path / "precious"), str(tmp_path / "doomed/z"))
        os.unlink = unlink
        unlink(name, **where)

    os.scandir = _Sorted(os.scandir)
    os.unlink = mount_then_unlink
    with pytest.raises(FailedPrecondition):
        mounts.remove_tree(str(tmp_path / "doomed"))
    assert (tmp_path / "precious/data").exists()


class _Sorted:
    """os.scandir with its entries in order of their names."""

    def __init__(self, scandir):
        self._scandir = scandir

    def __call__(self, fd):
        with self._scandir(fd) as entries:
            return _Entries(sorted(entries, key=lambda entry: entry.name))


class _Entries(list):
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def test_an_old_kernel_is_named(monkeypatch):
    class OldLibc:
        def syscall(self, *args):
            ctypes.set_errno(errno.ENOSYS)
            return -1

    monkeypatch.setattr(mounts, "_libc", OldLibc())
    with pytest.raises(KatashimError, match="Linux 5.12"):
        mounts.bind("/tmp", "/tmp")
