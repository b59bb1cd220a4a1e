"""What the tests of storage hang their acquired things on: an undo stack with a journal."""

import os

from katashim import child, undo
from katashim.resources import mounts


def _remove(function, path):
    try:
        function(path)
    except FileNotFoundError:
        pass


RELEASES = {
    "mount": lambda target: mounts.unmount(target),
    "tree": lambda path: mounts.remove_tree(path),
    "dir": lambda path: _remove(os.rmdir, path),
    "file": lambda path: _remove(os.unlink, path),
    "process": lambda pid, start_time, name: pid and child.kill_identity(pid, start_time),
}


def stack(journal=None):
    """An undo stack, with its journal at the path `journal`."""
    return undo.Undo(None if journal is None else str(journal), RELEASES)
