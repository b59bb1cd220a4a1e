import errno
import os
import random
import select
import signal
import socket

import pytest
from acquired import RELEASES, stack
from private_mounts import fork, private_mounts, wait
from shares import make_place, needs_daemon, settings

from katashim import child, green, undo
from katashim.errors import (
    AlreadyExists,
    ConfigError,
    HypervisorError,
    InvalidArgument,
    NotFound,
    Unsupported,
)
from katashim.resources import mounts, sharefs, virtiofsd

# Every virtiofsd of this machine, of both flavours where both are there; the variable names one more.
DAEMONS = [path for path in (*virtiofsd.PLACES, os.environ.get("KATASHIM_TEST_VIRTIOFSD"))
           if path and os.access(path, os.X_OK)]
DAEMON = None           # the one that this test uses


@pytest.fixture(params=DAEMONS or [None], ids=str)
def place(request, tmp_path, monkeypatch):
    """A sandbox's directories and a user's data, all below the test's own directory."""
    monkeypatch.setitem(globals(), "DAEMON", request.param)
    make_place(tmp_path, monkeypatch)
    precious = tmp_path / "precious"
    (precious / "deep/er").mkdir(parents=True)
    (precious / "data").write_text("keep me")
    (precious / "deep/er/data").write_text("me too")
    return tmp_path


def config(**changes):
    return settings(**{"virtio_fs_daemon": DAEMON, **changes})


def is_whole(place):
    precious = place / "precious"
    return (precious / "data").read_text() == "keep me" and (precious / "deep/er/data").read_text() == "me too"


def left_over(place):
    """Everything of a sandbox that is still there."""
    found = [entry.target for entry in mounts.at_or_below(str(place))]
    for top in ("shared", "run/s1"):
        if (place / top).exists():
            found += [str(path) for path in (place / top).rglob("*")]
    return found


def is_readonly(path):
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError as exc:
        return exc.errno == errno.EROFS
    return False


# -- the daemon's command -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind, changes, expected", [
    ("rust", {}, ["/v", "--fd=5", "--shared-dir=/ro", "--cache=never", "--announce-submounts"]),
    ("rust", {"cache": "metadata", "xattr": True, "extra_args": ("--thread-pool-size=1",)},
     ["/v", "--fd=5", "--shared-dir=/ro", "--cache=metadata", "--announce-submounts", "--xattr",
      "--thread-pool-size=1"]),
    ("rust", {"extra_args": ("-o", "announce_submounts")},
     ["/v", "--fd=5", "--shared-dir=/ro", "--cache=never", "-o", "announce_submounts"]),
    ("c", {}, ["/v", "--fd=5", "-f", "-o", "source=/ro", "-o", "cache=none", "-o", "announce_submounts"]),
    ("c", {"cache": "always", "xattr": True, "extra_args": ("--thread-pool-size=1", "-o", "announce_submounts")},
     ["/v", "--fd=5", "-f", "-o", "source=/ro", "-o", "cache=always", "-o", "xattr", "--thread-pool-size=1",
      "-o", "announce_submounts"]),
])
def test_each_flavour_gets_its_own_words(kind, changes, expected):
    assert virtiofsd.command("/v", kind, 5, virtiofsd.Settings("/ro", **changes)) == expected


def test_a_cache_mode_that_the_c_flavour_lacks_is_named():
    with pytest.raises(ConfigError, match="virtio_fs_cache = metadata: /v is QEMU's"):
        virtiofsd.command("/v", "c", 5, virtiofsd.Settings("/ro", cache="metadata"))


def program(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_the_flavour_is_asked_once_for_each_version_of_the_file(tmp_path):
    asked = tmp_path / "asked"
    path = program(tmp_path / "v", f"echo x >>{asked}; echo '      --shared-dir <SHARED_DIR>'")
    assert [virtiofsd.flavour(path) for _ in range(3)] == ["rust"] * 3
    assert asked.read_text() == "x\n"
    program(tmp_path / "v", "echo '    -o source=PATH   shared directory tree' >&2; exit 3")
    os.utime(path, ns=(1, 1))
    assert virtiofsd.flavour(path) == "c"
    with pytest.raises(ConfigError, match="is no virtiofsd that katashim knows"):
        virtiofsd.flavour("/bin/true")


def test_the_daemon_is_looked_for(tmp_path, monkeypatch):
    with pytest.raises(NotFound, match="virtio_fs_daemon = /no/such: no such program"):
        virtiofsd.find("/no/such")
    monkeypatch.setattr(virtiofsd, "PLACES", (str(tmp_path / "a"), str(tmp_path / "b")))
    with pytest.raises(NotFound, match="shared_fs = none; looked at .*/a, .*/b"):
        virtiofsd.find()
    program(tmp_path / "b", "")
    assert virtiofsd.find() == str(tmp_path / "b")


# -- the daemon itself --------------------------------------------------------------------------------
@needs_daemon
@private_mounts
def test_life_of_a_share(place):
    acquired = stack(place / "run/s1/journal")
    share = sharefs.ShareFs("s1", config(), acquired)
    share.start()
    assert share.device() == ("kataShared", str(place / "run/s1/virtiofsd.sock"), 1024)
    assert share.storage()[:5] == ("virtio-fs", "kataShared", "virtiofs", ("nodev",),
                                   "/run/kata-containers/shared/containers/")
    assert os.stat(place / "shared/s1").st_mode & 0o777 == 0o700
    assert os.stat(share.socket_path).st_mode & 0o777 == 0o600
    with open(f"/proc/{share.pids()[0]}/cmdline") as cmdline:
        assert str(place / "shared/s1/ro") in cmdline.read()
    assert not share.exited.is_set()
    assert share.stop() == [] and share.stop() == []
    assert share.exited.is_set() and share.pids() == []
    assert os.listdir(place / "run/s1") == ["journal"] and os.listdir(place / "shared") == []
    assert len(acquired) == 0
    assert undo.read(str(place / "run/s1/journal"))[1] == []


@needs_daemon
@private_mounts
def test_nothing_survives_the_daemon_that_serves_a_guest(place):
    """Once connected, the C daemon forks a worker into namespaces of its own; that one dies too."""
    share = sharefs.ShareFs("s1", config(), stack())
    share.start()
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(share.socket_path)
        with green.deadline(5, "the daemon to fork its worker"):
            while len(share.pids()) < 2:
                green.in_thread(os.sched_yield, what="a moment")
        pids = share.pids()
        assert share.stop() == []
    assert [pid for pid in pids if child.start_time(pid)] == []
    assert left_over(place) == []


@needs_daemon
@private_mounts
def test_a_killed_daemon_is_noticed(place):
    share = sharefs.ShareFs("s1", config(), stack())
    share.start()
    os.kill(share.pids()[0], signal.SIGKILL)
    assert share.exited.wait(5)
    with pytest.raises(HypervisorError, match=r"virtiofsd \(.*\) killed by SIGKILL: "):
        share.device()
    assert share.stop() == []


@needs_daemon
@private_mounts
def test_a_daemon_that_will_not_start_tells_why_and_leaves_nothing(place):
    acquired = stack(place / "run/s1/journal")
    share = sharefs.ShareFs("s1", config(virtio_fs_extra_args=("--no-such-option",)), acquired)
    with pytest.raises(HypervisorError, match="exited with status [12]: .*no-such-option"):
        share.start()
    assert len(acquired) == 0
    assert left_over(place) == [str(place / "run/s1/journal")]
    assert child.living() == set()


@private_mounts
def test_what_cannot_be_shared_is_refused_before_anything_is_made(place):
    with pytest.raises(Unsupported, match="shared_fs = virtio-9p"):
        sharefs.ShareFs("s1", config(shared_fs="virtio-9p"), stack())
    with pytest.raises(InvalidArgument):
        sharefs.ShareFs("../s1", config(), stack())
    with pytest.raises(NotFound, match="no such program"):
        sharefs.ShareFs("s1", config(virtio_fs_daemon="/no/such"), stack()).start()
    (place / "shared/s1").mkdir(parents=True)
    with pytest.raises(AlreadyExists, match="a sandbox of this id runs"):
        sharefs.ShareFs("s1", config(), stack()).start()
    assert (place / "shared/s1").exists()
    long_id = "x" * 100
    (place / "run" / long_id).mkdir()
    with pytest.raises(InvalidArgument, match="a unix socket takes at most 107"):
        sharefs.ShareFs(long_id, config(), stack()).start()
    assert os.listdir(place / "shared") == ["s1"]


# -- binds --------------------------------------------------------------------------------------------
def started(place, acquired=None):
    share = sharefs.ShareFs("s1", config(), stack() if acquired is None else acquired)
    share.start()
    return share


def both_views(place, name):
    return [place / "shared/s1" / view / "passthrough" / name for view in ("rw", "ro")]


@needs_daemon
@private_mounts
def test_binds_appear_in_both_views_with_the_same_rights(place):
    share, container = started(place), stack()
    guest = share.bind(str(place / "precious"), "c1/rootfs", False, container)
    assert guest == "/run/kata-containers/shared/containers/passthrough/c1/rootfs"
    assert share.bind(str(place / "precious"), "vol", True, container).endswith("/passthrough/vol")
    assert share.bind(str(place / "precious/data"), "file", True, container).endswith("/passthrough/file")
    assert [is_readonly(view / "data") for view in both_views(place, "c1/rootfs")] == [False, False]
    assert [is_readonly(view / "data") for view in both_views(place, "vol")] == [True, True]
    assert [is_readonly(view) for view in both_views(place, "file")] == [True, True]
    with pytest.raises(OSError) as failure:
        os.mkdir(place / "shared/s1/ro/passthrough/new")
    assert failure.value.errno == errno.EROFS
    assert container.unwind() == []
    assert [os.listdir(view) for view in both_views(place, ".")] == [[], []]
    assert share.stop() == [] and is_whole(place)


@needs_daemon
@private_mounts
@pytest.mark.parametrize("root", [mounts.MS_PRIVATE, mounts.MS_SLAVE])
def test_views_are_joined_whatever_the_namespace_is_like(place, root):
    mounts.set_propagation("/", root | mounts.MS_REC)
    share, container = started(place), stack()
    share.bind(str(place / "precious"), "vol", False, container)
    assert [sorted(os.listdir(view)) for view in both_views(place, "vol")] == [["data", "deep"]] * 2
    assert container.unwind() == [] and share.stop() == []


@needs_daemon
@private_mounts
@pytest.mark.parametrize("sandbox", ["namespace", "chroot"])
def test_the_guest_sees_binds_that_come_after_it(place, sandbox):
    """The daemon's own view, in its own mount namespace, gets later binds, read-only where they are."""
    acquired = stack()
    share = sharefs.ShareFs("s1", config(virtio_fs_extra_args=("-o", f"sandbox={sandbox}")), acquired)
    share.start()
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(share.socket_path)
        def root():
            return f"/proc/{share.pids()[-1]}/root"
        with green.deadline(5, "the daemon to enter its sandbox"):
            while not os.path.isdir(root() + "/passthrough"):
                green.in_thread(os.sched_yield, what="a moment")
        container = stack()
        share.bind(str(place / "precious"), "c1/rootfs", False, container)
        share.bind(str(place / "precious"), "vol", True, container)
        assert not is_readonly(root() + "/passthrough/c1/rootfs/data")
        assert is_readonly(root() + "/passthrough/vol/data")
        with open(root() + "/passthrough/vol/data"):
            assert container.unwind() == []                 # in use there, and still it goes
        assert os.listdir(root() + "/passthrough") == []
        assert share.stop() == []


@needs_daemon
@private_mounts
def test_names_are_checked_and_taken_once(place):
    share, container = started(place), stack()
    for name in ("", "..", "a/../b", "/a", "a/b/c", "a/"):
        with pytest.raises(InvalidArgument, match="is no name"):
            share.bind(str(place / "precious"), name, False, container)
    share.bind(str(place / "precious"), "vol", False, container)
    with pytest.raises(AlreadyExists):
        share.bind(str(place / "precious"), "vol", False, container)
    with pytest.raises(NotFound, match="cannot share /no/such: No such file"):
        share.bind("/no/such", "other", False, container)
    assert share.stop() == []


@needs_daemon
@private_mounts
def test_a_volume_is_bound_once_and_goes_with_its_last_user(place):
    share, first, second, third = started(place), stack(), stack(), stack()
    source = str(place / "precious")
    (place / "alias").symlink_to(source)
    written = share.share(source, False, first)
    assert share.share(str(place / "alias"), False, second) == written
    assert share.share(source, True, third) == written          # a reader sees the writer's files
    assert share.share(source + "/data", True, third).endswith("-data")
    assert written.split("/")[-1].startswith("sandbox-") and written.endswith("-precious")
    assert len(os.listdir(place / "shared/s1/rw/passthrough")) == 2
    assert first.unwind() == [] and second.unwind() == []
    assert len(os.listdir(place / "shared/s1/ro/passthrough")) == 2
    assert third.unwind() == []
    assert os.listdir(place / "shared/s1/ro/passthrough") == []
    assert share.share(source, True, first) != written          # it is made anew
    assert share.stop() == [] and is_whole(place)
    assert first.unwind() == []                                 # late, and no error


@needs_daemon
@private_mounts
def test_a_reader_before_the_writer_cannot_write(place):
    share, container = started(place), stack()
    source = str(place / "precious")
    read, written = share.share(source, True, container), share.share(source, False, container)
    names = [os.path.basename(path) for path in (read, written)]
    assert [is_readonly(place / "shared/s1/ro/passthrough" / name / "data") for name in names] == [True, False]
    assert share.share(source, True, container) == written
    assert share.stop() == []


@needs_daemon
@private_mounts
def test_names_too_long_or_empty_are_made_to_fit(place):
    share, container = started(place), stack()
    long = place / ("é" * 120)
    long.mkdir()
    assert len(os.path.basename(share.share(str(long), True, container)).encode()) < 255
    assert share.share("/", True, container).endswith("-root")
    assert share.stop() == [] and is_whole(place)


# -- the user's data ----------------------------------------------------------------------------------
def with_binds(place, acquired):
    """A share in use: root filesystem, volume and file of the user's bound writable."""
    share = started(place, acquired)
    container = acquired.child("container c1")
    share.bind(str(place / "precious"), "c1/rootfs", False, container, recursive=True)
    share.share(str(place / "precious/deep"), False, container)
    share.share(str(place / "precious/data"), False, container)
    return share


@needs_daemon
@private_mounts
def test_the_users_data_survives_a_replay_in_every_order(place):
    journal = str(place / "run/s1/journal")
    order = random.Random(7)
    for _ in range(25):
        acquired = stack(journal)
        share = with_binds(place, acquired)
        entries = undo.read(journal)[1]
        assert {kind for _, kind, _ in entries} == {"tree", "mount", "file", "process", "dir"}
        order.shuffle(entries)
        for _, kind, arguments in entries:
            try:
                RELEASES[kind](**arguments)
            except OSError as exc:
                assert exc.errno in (errno.EBUSY, errno.ENOTEMPTY, errno.EROFS), exc
            assert is_whole(place), f"after releasing {kind} {arguments}"
        assert share.exited.wait(5)
        assert undo.replay(journal, RELEASES) == []
        assert left_over(place) == [journal] and is_whole(place)
        os.unlink(journal)


class forked_shim:
    """``with forked_shim(place) as pid:`` a process that has a share in its own mount namespace, in use, and
    its journal. At the end nothing of it runs, however the test went."""

    def __init__(self, place):
        self._place, self._journal = place, str(place / "run/s1/journal")

    def __enter__(self):
        reader, writer = os.pipe()
        self._pid = fork(self._run, writer)
        os.close(writer)
        assert os.read(reader, 1) == b"x", "see the trace on stderr"
        os.close(reader)
        self._daemons = [entry for entry in undo.read(self._journal)[1] if entry[1] == "process"]
        return self._pid

    def _run(self, writer):
        with_binds(self._place, stack(self._journal))
        os.write(writer, b"x")
        signal.pause()

    def __exit__(self, *error):
        os.kill(self._pid, signal.SIGKILL)
        assert wait(self._pid) == -signal.SIGKILL
        for _, kind, arguments in self._daemons:
            RELEASES[kind](**arguments)
        return False


@needs_daemon
def test_delete_cleans_up_after_a_killed_shim_from_outside(place):
    """The shim's mounts are in a namespace that `delete` does not see; the directories it does."""
    journal = str(place / "run/s1/journal")
    with forked_shim(place) as pid:
        assert mounts.at_or_below(str(place)) == []
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0]
        os.close(pidfd)
        assert undo.replay(journal, RELEASES) == []
        assert left_over(place) == [journal] and is_whole(place)


@needs_daemon
def test_replay_beside_a_living_shim_does_no_harm_to_data(place):
    """The worst case: the directories go while the shim's binds still stand on them."""
    journal = str(place / "run/s1/journal")
    with forked_shim(place):
        undo.replay(journal, RELEASES)
        assert left_over(place) == [journal] and is_whole(place)
    assert is_whole(place)
