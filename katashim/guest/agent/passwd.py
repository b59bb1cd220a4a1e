"""A user's home directory, as a container's /etc/passwd has it. Called by container.py, enter.py."""

import os

from katashim.guest.agent import linux

_LIMIT = 1 << 20


def home(root, uid):
    """The home of `uid` in the container whose root is at `root`; "/" when it does not say."""
    try:
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = linux.open_in_root(directory, "etc/passwd", os.O_RDONLY)
        finally:
            os.close(directory)
        try:
            text = os.read(fd, _LIMIT)
        finally:
            os.close(fd)
    except OSError:
        return "/"      # no such file, or none that can be read
    for line in text.splitlines():
        fields = line.split(b":")
        if len(fields) > 5 and fields[2] == b"%d" % uid:
            return os.fsdecode(fields[5]) or "/"
    return "/"
