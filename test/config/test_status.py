"""A setting is marked as working exactly when some code acts on it: nothing is ignored in silence."""

import ast
import glob
import os
from collections import defaultdict

import pytest

import katashim
from katashim.config.table import keys

PACKAGE = os.path.dirname(os.path.abspath(katashim.__file__))

# What the loader itself acts on: it judges annotations by these, selects tables, or puts them on the
# guest's kernel command line, from where the agent reads them.
BY_THE_LOADER = {
    "hypervisor.enable_annotations", "runtime.hypervisor_name", "runtime.agent_name", "agent.dial_timeout_ms",
    "agent.enable_debug", "agent.enable_tracing", "agent.debug_console_enabled", "agent.visible_cdi_devices",
    "agent.container_pipe_size", "agent.launch_process_timeout", "agent.cdh_api_timeout_ms", "runtime.name"}

# Read only to refuse them with an error of their own.
REFUSED = {"hypervisor.rootless", "hypervisor.confidential_guest"}


def attributes_read():
    """Full names of the settings that the code reads as attributes, outside the configuration and tools.

    Kata's names are long enough not to be attributes of other things. One that several sections share
    counts for a section that the expression before it names; drivers read the hypervisor's only.
    """
    found, by_name = set(), defaultdict(list)
    for key in keys():
        by_name[key.name].append(key)
    for path in glob.glob(f"{PACKAGE}/**/*.py", recursive=True):
        if path.split("/katashim/")[-1].partition("/")[0] in ("config", "ctl", "guest"):
            continue
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        for node in ast.walk(tree):
            named = by_name.get(node.attr, ()) if isinstance(node, ast.Attribute) else ()
            if len(named) > 1:
                owner = "hypervisor" if "/drivers/" in path else ast.unparse(node.value)
                named = [key for key in named if key.section in owner]
            found |= {key.full_name for key in named}
    return found


@pytest.fixture(scope="module")
def read():
    return attributes_read()


def test_what_is_marked_as_working_is_read(read):
    """If this fails: some key says done=True in katashim/config/*_keys.py, and no code reads it."""
    unread = {key.full_name for key in keys()
              if key.done and key.full_name not in read | BY_THE_LOADER
              and not key.name.startswith("valid_") and key.section != "agent.mem_agent"}
    assert not unread


def test_what_is_read_is_marked_as_working(read):
    """If this fails: set done=True for the key and run python -m katashim.ctl.configdoc."""
    unmarked = {key.full_name for key in keys() if not key.done and key.full_name in read - REFUSED}
    assert not unmarked
