"""``katashim-ctl version``: what is installed, for people and bug reports."""

import importlib.metadata
import platform

from katashim import VERSION
from katashim.ctl import output

_PACKAGES = ("gevent", "protobuf", "configobj")


def add_arguments(parser):
    """It has no options of its own."""


def main(args):
    versions = {"katashim": VERSION, "python": platform.python_version(), "kernel": platform.release()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    output.emit(args, versions, output.columns(
        [(name, version or "not installed") for name, version in versions.items()]))
    return 0
