"""Files and directories for a guest that shares no filesystem: copied in by the agent's CopyFile.

A copy is made once, when the container is created: what either side changes later the other does not
see. So only what is small and not meant to be written back comes in this way; all else is refused
with the reason.

CopyFile's own rules (Kata's agent): the path lies below /run/kata-containers/shared/containers/; a
file is written piece by piece into ``<path without its suffix>.tmp`` and renamed when it has
`file_size` bytes; a directory or symbolic link is one call with S_IFDIR or S_IFLNK in `file_mode`.
"""

import os
import stat

from katashim import green
from katashim.errors import FailedPrecondition, NotFound, ResourceExhausted, Unsupported
from katashim.resources import guest_paths

PIECE_BYTES = 1 << 20           # a ttRPC frame takes 4 MiB
MAX_BYTES = 64 << 20            # of one volume; it lies in the guest's memory
MAX_ENTRIES = 4096

_PARENT_MODE = 0o750


def copy_in(agent, source, name):
    """Copy a file or a directory of the host into the guest.

    :param agent: katashim.agent.Agent.
    :param source: absolute path; a symbolic link at its end is followed, those inside are copied.
    :param name: what it is called below the guest's shared directory; one name.
    :returns: its path in the guest.
    :raises NotFound: no such source. :raises Unsupported: it is, or holds, a socket, FIFO or device.
    :raises ResourceExhausted: it is larger than MAX_BYTES or MAX_ENTRIES.
    """
    source = os.path.realpath(source)
    return _Copy(agent, source).run(guest_paths.SHARED + name)


class _Copy:
    """One volume on its way into the guest."""

    def __init__(self, agent, source):
        self._agent, self._source = agent, source
        self._bytes = self._entries = 0

    def run(self, guest_path):
        try:
            self._entry(self._source, guest_path)
        except OSError as exc:
            raise NotFound(f"cannot copy {exc.filename or self._source} into the guest: {exc.strerror}") from exc
        return guest_path

    def _entry(self, path, guest_path):
        info = green.in_thread(os.lstat, path, what=f"looking at {path}")
        self._entries += 1
        self._check_limits(info.st_size if stat.S_ISREG(info.st_mode) else 0)
        if stat.S_ISREG(info.st_mode):
            self._file(path, guest_path)
        elif stat.S_ISDIR(info.st_mode):
            self._send(guest_path, info)
            for name in sorted(green.in_thread(os.listdir, path, what=f"listing {path}"), key=_tmp_last):
                self._entry(f"{path}/{name}", f"{guest_path}/{name}")
        elif stat.S_ISLNK(info.st_mode):
            target = os.fsencode(os.readlink(path))
            self._send(guest_path, info, file_size=len(target), data=target)
        else:
            raise Unsupported(f"{path} is a {_kind(info.st_mode)}, which cannot be copied into the guest")

    def _check_limits(self, size):
        self._bytes += size
        if self._bytes > MAX_BYTES:
            raise ResourceExhausted(
                f"{self._source} is larger than {MAX_BYTES >> 20} MiB, the most that is copied into a guest: "
                "set shared_fs = virtio-fs to share it")
        if self._entries > MAX_ENTRIES:
            raise ResourceExhausted(
                f"{self._source} holds more than {MAX_ENTRIES} files, the most that are copied into a guest: "
                "set shared_fs = virtio-fs to share it")

    def _file(self, path, guest_path):
        # O_NONBLOCK and the second look: the name may have become a FIFO since the first.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            offset = 0
            while True:
                want = min(PIECE_BYTES, info.st_size - offset)
                data = green.in_thread(os.pread, fd, want, offset, what=f"reading {path}")
                if len(data) < want:
                    raise FailedPrecondition(f"{path} became shorter while it was copied into the guest")
                self._send(guest_path, info, file_size=info.st_size, offset=offset, data=data)
                offset += want
                if offset == info.st_size:
                    return
        finally:
            os.close(fd)

    def _send(self, guest_path, info, *, file_size=0, offset=0, data=b""):
        self._agent.CopyFile(path=guest_path, file_size=file_size, file_mode=info.st_mode,
                             dir_mode=_PARENT_MODE, uid=info.st_uid, gid=info.st_gid, offset=offset, data=data)


def _tmp_last(name):
    """Order of the names in a directory: the agent writes ``a.conf`` by way of ``a.tmp`` and would
    overwrite a real one of that name that came first."""
    return name.endswith(".tmp"), name


def _kind(mode):
    kinds = ((stat.S_ISSOCK, "socket"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISBLK, "block device"),
             (stat.S_ISCHR, "character device"))
    return next((word for test, word in kinds if test(mode)), "special file")
