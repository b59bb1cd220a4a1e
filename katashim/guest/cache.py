"""Layers of the guest image that are kept between builds, each in a directory named by its inputs.

    /var/cache/katashim/guest/
        packages-<key>/     Debian's packages, unpacked, and the kernel's package
        kernel-<key>/       vmlinux and modules, extracted or built
        lock                held while a build writes

A layer is made in a directory beside its place and renamed, so one that exists is whole. The key is
the hash of everything the layer was made from: a layer never changes, it is only replaced by
another key, and :meth:`Cache.prune` drops those that no build has used for a while.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time

from katashim.errors import DeadlineExceeded

DEFAULT_DIR = "/var/cache/katashim/guest"
KEEP_DAYS = 30


def key_of(*inputs):
    """A short stable name for what `inputs` (JSON values) say."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path):
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Cache:
    """The directory of layers, to be used as a context manager, which holds its lock.

    :param root: path of the cache; made when missing.
    :param wait_s: how long to wait for another build.
    """

    def __init__(self, root=DEFAULT_DIR, wait_s=1800):
        self.root = root
        self._wait_s = wait_s
        self._lock = None

    def __enter__(self):
        os.makedirs(self.root, exist_ok=True)
        self._lock = open(os.path.join(self.root, "lock"), "w")
        end = time.monotonic() + self._wait_s
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self
            except BlockingIOError as exc:
                if time.monotonic() > end:
                    self._lock.close()
                    raise DeadlineExceeded(
                        f"waited {self._wait_s} s for another guest build to leave {self.root}") from exc
                time.sleep(0.2)

    def __exit__(self, *error):
        self._lock.close()
        return False

    def layer(self, name, key, make):
        """The directory of the layer `name` with `key`; `make(directory)` fills it when it is not there."""
        path = os.path.join(self.root, f"{name}-{key}")
        if not os.path.isdir(path):
            making = f"{path}.making"
            if os.path.isdir(making):
                shutil.rmtree(making)
            os.mkdir(making)
            try:
                make(making)
            except BaseException:
                shutil.rmtree(making)
                raise
            os.rename(making, path)
        os.utime(path)
        return path

    def drop(self, name):
        """Forget all layers called `name`, so that the next build makes it anew."""
        for entry in self._layers():
            if entry.rpartition("-")[0] == name:
                shutil.rmtree(os.path.join(self.root, entry))

    def prune(self, keep_days=KEEP_DAYS):
        """Delete layers that were not used for `keep_days`, and what an interrupted build left."""
        oldest = time.time() - keep_days * 86400
        for entry in self._layers():
            path = os.path.join(self.root, entry)
            if entry.endswith(".making") or os.stat(path).st_mtime < oldest:
                shutil.rmtree(path)

    def _layers(self):
        return [entry for entry in sorted(os.listdir(self.root)) if os.path.isdir(os.path.join(self.root, entry))]
