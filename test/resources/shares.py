"""A real share of a sandbox "s1", below a test's own directory."""

import os
from types import SimpleNamespace

import pytest
from acquired import stack

from katashim import state
from katashim.resources import sharefs, virtiofsd

needs_daemon = pytest.mark.skipif(not any(os.access(path, os.X_OK) for path in virtiofsd.PLACES),
                                  reason="no virtiofsd is installed")


def settings(**changes):
    """The keys of [hypervisor.NAME] that a share reads."""
    return SimpleNamespace(**{"shared_fs": "virtio-fs", "virtio_fs_daemon": "", "virtio_fs_cache": "auto",
                              "virtio_fs_extra_args": (), "virtio_fs_queue_size": 1024,
                              "disable_guest_selinux": True, **changes})


def make_place(directory, monkeypatch):
    """The directories of sandbox "s1" below `directory`, a pathlib.Path."""
    monkeypatch.setattr(sharefs, "SHARED_ROOT", str(directory / "shared"))
    monkeypatch.setattr(state, "RUN_ROOT", str(directory / "run"))
    (directory / "run/s1").mkdir(parents=True)


class shared:
    """``with shared() as share:`` a started ShareFs, stopped without a failure at the end."""

    def __enter__(self):
        self._share = sharefs.ShareFs("s1", settings(), stack())
        self._share.start()
        return self._share

    def __exit__(self, *error):
        assert self._share.stop() == []
        return False
