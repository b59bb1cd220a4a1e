"""The layers of katashim/__init__.py, and the other rules that only a look at all files can keep."""

import ast
import os

import pytest

PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "katashim")
MAX_LINES = 600

# Longest match counts. A module or package that is not here is a mistake in this table, or in the layout.
LAYERS = {
    "katashim": 0, "katashim.errors": 0, "katashim.log": 0, "katashim.green": 0, "katashim.child": 0,
    "katashim.timeline": 0,
    "katashim.ttrpc": 1, "katashim.config": 1, "katashim.state": 1, "katashim.host": 1,
    "katashim.kvm_probe": 1, "katashim.oci": 1, "katashim.undo": 1,
    # Plain modules around one part of the kernel each; they happen to live among the resources.
    "katashim.resources.netlink": 1, "katashim.resources.netns": 1, "katashim.resources.mounts": 1,
    "katashim.resources.cgroupfs": 1,
    "katashim.drivers": 2, "katashim.agent": 2,
    "katashim.resources": 3,
    "katashim.runtime": 4,
    "katashim.services": 5,
    "katashim.shim": 6, "katashim.debug": 6, "katashim.ctl": 6,
    "katashim.guest": 6,            # runs in the guest, or builds it: a program of its own
}
# What drivers have in common; the parts of QEMU's driver are one driver.
SHARED_BY_DRIVERS = ("base", "channel", "console", "rest", "vsock")
GUEST_AGENT = "katashim.guest.agent"


def module_name(path):
    name = os.path.relpath(path, os.path.dirname(PACKAGE))[:-len(".py")].replace(os.sep, ".")
    return name.removesuffix(".__init__")


def sources():
    """``{module name: path}`` of the whole package."""
    return {module_name(os.path.join(folder, name)): os.path.join(folder, name)
            for folder, _, names in os.walk(PACKAGE) for name in names if name.endswith(".py")}


SOURCES = sources()


def parse(name):
    with open(SOURCES[name]) as file:
        return ast.parse(file.read())


def imports(name):
    """The modules of ours that a module imports, anywhere in it; ``from x import y`` may mean module x.y."""
    found = set()
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if SOURCES[name].endswith("__init__.py") else name.rpartition(".")[0]
                parts = package.split(".")[:len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *filter(None, [node.module])])
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base
                         for alias in node.names)
    return found


def layer(name):
    while name not in LAYERS:
        name, _, last = name.rpartition(".")
        if name in ("", "katashim"):
            raise AssertionError(f"katashim.{last} stands in no layer")
    return LAYERS[name]


def ours(names):
    return sorted(name for name in names if name == "katashim" or name.startswith("katashim."))


# -- the rules ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_point_down_or_stay_level(name):
    upwards = [other for other in ours(imports(name)) if layer(other) > layer(name)]
    assert not upwards, f"{name} (layer {layer(name)}) imports {upwards}"


def test_the_table_has_no_layer_of_something_that_is_not_there():
    planned = {"katashim.debug"}
    assert {name for name in LAYERS if name not in SOURCES} <= planned


def driver_of(name):
    """Which driver a module of katashim.drivers belongs to."""
    return name.split(".")[2].split("_")[0].replace("qmp", "qemu")


@pytest.mark.parametrize("name", sorted(name for name in SOURCES if name.startswith("katashim.drivers.")))
def test_drivers_do_not_import_one_another(name):
    others = {other for other in imports(name)
              if other.startswith("katashim.drivers.") and driver_of(other) != driver_of(name)
              and other.split(".")[2] not in SHARED_BY_DRIVERS}
    if name.split(".")[2] == "vsock":
        others = {other for other in others if driver_of(other) != "vhost"}     # it starts the program
    assert not others


def test_only_green_names_the_patching():
    users = set()
    for name in SOURCES:
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.ImportFrom) and (
                    node.module == "gevent.monkey"
                    or node.module == "gevent" and any(alias.name == "monkey" for alias in node.names)):
                users.add(name)
            if isinstance(node, ast.Import) and any(alias.name == "gevent.monkey" for alias in node.names):
                users.add(name)
            if isinstance(node, ast.Attribute) and node.attr == "monkey":
                users.add(name)
    assert users == {"katashim.green"}


def test_only_the_proto_package_touches_protobuf():
    users = {name for name in SOURCES if any(other.startswith("google") for other in imports(name))}
    assert users and all(name.startswith("katashim.ttrpc.proto") for name in users)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_no_file_is_long(name):
    with open(SOURCES[name]) as file:
        assert sum(1 for _ in file) <= MAX_LINES


def test_the_guests_agent_stands_alone():
    """It is copied into the guest without the rest of katashim, but for the framing, and without packages."""
    strangers = {(name, other) for name in SOURCES if name.startswith(GUEST_AGENT)
                 for other in imports(name)
                 if other.split(".")[0] in ("gevent", "google")
                 or other.startswith("katashim.")
                 and not other.startswith(("katashim.guest", "katashim.ttrpc.frame"))}
    assert not strangers


def test_what_runs_without_gevent_imports_it_nowhere_at_the_top():
    """`delete` and the tools load these: no gevent when they are imported."""
    plain = ["katashim.undo", "katashim.state", "katashim.child", "katashim.timeline", "katashim.errors",
             "katashim.log", "katashim.resources.releases", "katashim.shim.delete", "katashim.shim.start",
             *(name for name in SOURCES if layer(name) == 1 and name.startswith("katashim.resources."))]
    reached, waiting = {}, [(name, (name,)) for name in plain]
    while waiting:
        name, way = waiting.pop()
        if name in reached:
            continue
        reached[name] = way
        waiting += [(other, (*way, other)) for other in top_level_imports(name)]
    assert not [way for name, way in reached.items() if name.split(".")[0] in ("gevent", "google")]


def top_level_imports(name):
    """What is imported when a module is: what stands in no function."""
    if name not in SOURCES:
        return set()
    found = set()
    for node in parse(name).body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base
                         for alias in node.names)
    return found


def test_every_module_says_what_it_is():
    silent = [name for name in SOURCES
              if not ast.get_docstring(parse(name)) and os.path.getsize(SOURCES[name])]
    assert not silent
