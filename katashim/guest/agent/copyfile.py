"""CopyFile: the host writes a file below the shared directory, where no filesystem is shared.

The path must lie below the shared directory and is resolved with that as its root, by the kernel
(openat2), so neither ``..`` nor a symbolic link leads anywhere else. Called by services.py.
"""

import os
import stat

from katashim.guest.agent import linux
from katashim.guest.agent.rpcerror import INVALID_ARGUMENT, RpcError

BASE = "/run/kata-containers/shared/containers"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def copy(request, base=BASE):
    """Do what a ``grpc.CopyFileRequest`` says: make a directory or a link, or write a part of a file.

    A file is complete, and in its place, when the last part has been written; a part at offset 0 starts anew.

    :raises RpcError: the path is outside of `base`.
    """
    inside = _inside(request.path, base)
    os.makedirs(base, exist_ok=True)
    root = os.open(base, _DIRECTORY)
    try:
        parent, _, name = inside.rpartition("/")
        directory = _make_parents(root, parent, request.dir_mode & 0o777 or 0o755, request.uid, request.gid)
        try:
            kind = stat.S_IFMT(request.file_mode)
            if kind == stat.S_IFDIR:
                _make_directory(directory, name, request)
            elif kind == stat.S_IFLNK:
                _make_link(directory, name, request)
            else:
                _write_part(directory, name, request)
        finally:
            os.close(directory)
    finally:
        os.close(root)


def _inside(path, base):
    """The part of `path` below `base`, without a slash before it."""
    prefix = base.rstrip("/") + "/"
    parts = [part for part in path[len(prefix):].split("/") if part not in ("", ".")]
    if not path.startswith(prefix) or not parts or ".." in parts:
        raise RpcError(INVALID_ARGUMENT, f"{path!r} is not below {base}")
    return "/".join(parts)


def _make_parents(root, path, mode, uid, gid):
    """Open the directory `path` below `root`, making what is missing; only the last one gets the owner."""
    directory = os.dup(root)
    parts = path.split("/") if path else []
    for index, name in enumerate(parts):
        try:
            os.mkdir(name, mode, dir_fd=directory)
            made = True
        except FileExistsError:
            made = False
        # The whole path anew from the root: a link in it must not lead out of the root.
        try:
            found = linux.open_in_root(root, "/".join(parts[:index + 1]), _DIRECTORY)
        finally:
            os.close(directory)
        directory = found
        if made:
            os.fchmod(directory, mode)
            if index == len(parts) - 1:
                os.fchown(directory, uid, gid)
    return directory


def _make_directory(directory, name, request):
    try:
        os.mkdir(name, dir_fd=directory)
    except FileExistsError:
        pass
    fd = linux.open_in_root(directory, name, _DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchmod(fd, request.file_mode & 0o7777)
        os.fchown(fd, request.uid, request.gid)
    finally:
        os.close(fd)


def _make_link(directory, name, request):
    _remove(directory, name)
    os.symlink(request.data, os.fsencode(name), dir_fd=directory)
    os.chown(name, request.uid, request.gid, dir_fd=directory, follow_symlinks=False)


def _write_part(directory, name, request):
    stem = name[:name.rindex(".")] if "." in name[1:] else name
    partial = f"{stem}.tmp"
    if request.offset == 0:
        _remove(directory, name)
        _remove(directory, partial)
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        os.pwrite(fd, request.data, request.offset)
        if os.fstat(fd).st_size != request.file_size:
            return
        os.fchmod(fd, request.file_mode & 0o7777)
        os.fchown(fd, request.uid, request.gid)
    finally:
        os.close(fd)
    os.rename(partial, name, src_dir_fd=directory, dst_dir_fd=directory)


def _remove(directory, name):
    """Remove a file, link or tree called `name`, whichever it is."""
    try:
        if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            import shutil
            shutil.rmtree(name, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
