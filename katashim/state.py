"""What a sandbox looks like from outside: /run/kata/<sandbox id>/state.json, and its directory.

The file is replaced whole and atomically at every change of state, so a reader never sees half of
it. It is for `delete`, for tools and for people; a live shim never reads it back. `version` counts
the format: a reader refuses a newer one instead of guessing.
"""

import json
import os

from katashim.errors import FailedPrecondition, InvalidArgument, KatashimError, NotFound

VERSION = 1
RUN_ROOT = os.environ.get("KATASHIM_RUN_ROOT", "/run/kata")

_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def check_id(identifier, what="id"):
    """Refuse an id that could leave its directory. containerd's rule: at most 76 characters,
    alphanumeric first, then alphanumerics and ``_.-``."""
    if (not identifier or len(identifier) > 128 or not set(identifier) <= _ALLOWED
            or not identifier[0].isalnum()):
        raise InvalidArgument(
            f"{what} {identifier!r} is not valid: 1 to 128 letters, digits, '_', '.', '-', "
            "the first a letter or digit")
    return identifier


def run_dir(sandbox_id):
    """The directory of one sandbox, ``/run/kata/<sandbox id>``."""
    return os.path.join(RUN_ROOT, check_id(sandbox_id, "sandbox id"))


def write(directory, record):
    """Replace state.json in `directory` by `record` (plain data)."""
    path = os.path.join(directory, "state.json")
    text = json.dumps({"version": VERSION, **record}, indent=1)
    try:
        with open(path + ".new", "w") as fresh:
            fresh.write(text)
        os.rename(path + ".new", path)
    except OSError as exc:
        raise KatashimError(f"cannot write {path}: {exc.strerror}") from exc


def read(directory):
    """The record in `directory`'s state.json.

    :raises NotFound: there is none. :raises FailedPrecondition: it was written by a newer katashim, or
        by something else.
    """
    path = os.path.join(directory, "state.json")
    try:
        with open(path) as state:
            record = json.load(state)
    except FileNotFoundError:
        raise NotFound(f"no sandbox state at {path}") from None
    except ValueError as exc:
        raise FailedPrecondition(f"{path} is not JSON: {exc}") from exc
    if not isinstance(record, dict) or not isinstance(record.get("version"), int):
        raise FailedPrecondition(f"{path} is no sandbox state of katashim's")
    if record["version"] > VERSION:
        raise FailedPrecondition(
            f"{path} has format {record['version']}, this katashim reads up to {VERSION}: use the newer one")
    return record
