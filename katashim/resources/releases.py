"""How each kind of thing on an undo stack is released: the table that katashim.undo works with.

Plain blocking functions (the daemon calls them in native threads, `delete` directly), each idempotent:
what was never acquired, or is gone already, is no error.
"""

import os

from katashim import child
from katashim.resources import cgroupfs, mounts, netlink, netns


def _without(function):
    """`function`, for paths that may be gone already."""
    def release(path):
        try:
            function(path)
        except FileNotFoundError:
            pass
    return release


def _end_process(pid, start_time, name):
    child.kill_identity(pid, start_time)


def _unmount(target):
    mounts.unmount(target)


def _remove_tree(path):
    mounts.remove_tree(path)


def _delete_link(netns, name, inode=None):
    netlink.delete_link(netns, name, inode)


def _delete_ingress(netns, dev, inode=None):
    netlink.delete_ingress(netns, dev, inode)


def _remove_netns(path):
    netns.remove(path)


def _remove_cgroup(path, new=()):
    cgroupfs.remove_path(path, new=new)


RELEASES = {
    "process": _end_process,
    "mount": _unmount,
    "tree": _remove_tree,
    "dir": _without(os.rmdir),
    "file": _without(os.unlink),
    "link": _delete_link,
    "ingress": _delete_ingress,
    "netns": _remove_netns,
    "cgroup": _remove_cgroup,
}
