"""Where this interpreter's installed packages are.

The shim runs as ``python -IS``: without the site module, whose work costs more than the rest of the
start. So it finds the packages itself: those of the virtual environment it was started from, or the
system's. Part of the start path: only C builtins are imported.
"""

import posix
import sys

from katashim.errors import FailedPrecondition

_NEEDED = ("gevent", "google/protobuf", "pythonjsonlogger")


def site_packages():
    """Directories that site.py would add to sys.path, those that exist."""
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
    home = sys.executable.rpartition("/")[0].rpartition("/")[0]
    if _exists(f"{home}/pyvenv.cfg"):
        candidates = [f"{home}/lib/{minor}/site-packages"]
    else:
        prefix = sys.prefix.rstrip("/")
        candidates = [f"{prefix}/lib/{minor}/site-packages",
                      f"{prefix}/local/lib/{minor}/dist-packages",      # Debian: pip's
                      f"{prefix}/lib/python3/dist-packages"]            # Debian: dpkg's
    return [path for path in candidates if _exists(path)]


def add_site_packages():
    """Append the directories of installed packages to sys.path.

    :raises FailedPrecondition: what the daemon needs is in none of them.
    """
    sys.path.extend(path for path in site_packages() if path not in sys.path)
    missing = [name for name in _NEEDED if not any(_exists(f"{path}/{name}") for path in sys.path)]
    if missing:
        raise FailedPrecondition(
            f"{sys.executable} has no {', '.join(missing)} in {', '.join(sys.path)}: install "
            "requirements.txt there, or set KATASHIM_PYTHON to an interpreter that has them")


def _exists(path):
    try:
        posix.stat(path)
    except OSError:
        return False
    return True
