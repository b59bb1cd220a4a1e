"""What cannot work: a clear error each time, soon, and nothing left behind."""

import json
import os
import subprocess

import pytest
from direct_shim import make_root, spec
from harness import leaks
from live_pods import FOREVER, pid_of

from katashim import errors

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(str(tmp_path_factory.mktemp("root") / "fs"))


@pytest.fixture(autouse=True)
def nothing_stays(shims, name):
    """After each test, not only at the module's end."""
    before = leaks.snapshot(scope=(name().rpartition("-")[0],))
    yield
    leaks.check(before)


def refusal(shim, **fields):
    """What Create of the shim's container is refused with."""
    with pytest.raises(errors.KatashimError) as raised:
        shim.create(**fields)
    return raised.value


def without(*path):
    """A spec from which one part is taken."""
    broken = spec("true")
    *way, last = path
    place = broken
    for key in way:
        place = place[key]
    del place[last]
    return broken


# -- the bundle -----------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [("process",), ("process", "args"), ("root",), ("linux",)], ids="-".join)
def test_a_spec_that_lacks_a_part_is_refused_by_its_name(shims, path):
    with shims("part", without(*path)) as shim:
        error = refusal(shim)
    assert error.code == errors.INVALID_ARGUMENT
    assert path[-1] in str(error) and "config.json" in str(error)


@pytest.mark.parametrize("change", [{"process": {"args": []}}, {"process": "sh"}, {"mounts": [{"type": "bind"}]},
                                    {"linux": {"namespaces": [7]}}], ids=json.dumps)
def test_a_spec_of_the_wrong_shape_is_refused(shims, change):
    with shims("shape", {**spec("true"), **change}) as shim:
        assert refusal(shim).code == errors.INVALID_ARGUMENT


def test_a_bundle_without_a_spec_is_refused(shims):
    with shims("nospec", None) as shim:
        error = refusal(shim)
    assert error.code == errors.NOT_FOUND and "config.json" in str(error)


@pytest.mark.parametrize("text", ["{", "[]", '{"annotations": 7}', "[" * 100000])
def test_a_spec_that_is_not_json_fails_the_start(shims, text):
    shim = shims("nojson", text)
    done = shim.verb("start", check=False)
    assert done.returncode == 1 and done.stdout == b""
    assert b"config.json" in done.stderr
    shim.verb("delete")


def test_a_missing_root_filesystem_is_named(shims):
    with shims("noroot", spec("true", root="no-such-root")) as shim:
        error = refusal(shim)
    assert error.code == errors.NOT_FOUND and "no-such-root" in str(error)


def test_a_bundle_by_a_relative_path_is_refused(shims, root):
    with shims("relative", spec("true", root=root)) as shim:
        assert refusal(shim, bundle="bundle").code == errors.INVALID_ARGUMENT


# -- the machine ----------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["kernel", "image", "boot_initrd"])
def test_a_missing_guest_is_named(shims, root, key):
    with shims("noguest", spec("true", root=root), **{key: "/no/such/file"}) as shim:
        error = refusal(shim)
    assert "/no/such/file" in str(error) and error.code in (errors.NOT_FOUND, errors.INVALID_ARGUMENT)


def test_a_missing_qemu_is_named(shims, root):
    with shims("noqemu", spec("true", root=root), path="/no/such/qemu",
               valid_hypervisor_paths="/no/such/qemu") as shim:
        assert "/no/such/qemu" in str(refusal(shim))


def test_a_qemu_that_exits_at_once_is_told(shims, root):
    with shims("false", spec("true", root=root), path="/bin/false",
               valid_hypervisor_paths="/bin/false") as shim:
        assert "exited with status 1" in str(refusal(shim))


def test_a_guest_that_panics_is_told_with_its_words(shims, root):
    with shims("panic", spec("true", root=root), kernel_params="rdinit=/no/such/init init=/no/such/init "
               "root=/dev/no-such") as shim:
        error = refusal(shim)
    assert "VM" in str(error) and "guest console" in error.message


def test_an_agent_that_never_answers_is_given_up_with_the_console_at_hand(shims, root):
    """It listens on a port of its own."""
    with shims("mute", spec("true", root=root), boot_timeout_s="6",
               kernel_params="systemd.unified_cgroup_hierarchy=1 agent.server_addr=vsock://-1:2024") as shim:
        error = refusal(shim)
    assert error.code == errors.DEADLINE_EXCEEDED
    for words in ("agent of sandbox", "6 s", "boot_timeout_s", "guest console", "phases"):
        assert words in error.message


def test_a_setting_that_there_is_not_is_named_with_its_line(shims, root):
    with shims("key", spec("true", root=root), no_such_key="1") as shim:
        error = refusal(shim)
    assert error.code == errors.INVALID_ARGUMENT
    assert "no_such_key" in str(error) and "katashim.conf:" in str(error)


def test_a_full_disk_under_the_state_is_told(shims, root, tmp_path):
    """And once there is room again the same id serves."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", tmp_path], check=True)
    try:
        with open(tmp_path / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        with shims("full", spec("true", root=root), env={"KATASHIM_RUN_ROOT": str(tmp_path)}) as shim:
            assert "No space left" in str(refusal(shim))
            assert os.listdir(tmp_path) == ["filler"]
            os.unlink(tmp_path / "filler")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# -- ids and addresses ----------------------------------------------------------------------------
@pytest.mark.parametrize("identifier", ["../escape", "a/b", "", ".hidden", "x" * 200, "tab\t", "ümlaut"])
def test_an_id_that_could_leave_its_directory_is_refused(shims, root, identifier):
    shim = shims("ids", spec("true", root=root))
    shim.name = identifier
    assert shim.verb("start", check=False).returncode == 1


@pytest.mark.parametrize("identifier", ["../escape", "a/b", ""])
def test_a_container_of_such_an_id_is_refused(shims, root, identifier):
    with shims("badid", spec("true", root=root)) as shim:
        with pytest.raises(errors.InvalidArgument):
            shim.api.call("Create", id=identifier, bundle=shim.bundle)


def test_the_longest_id_of_containerd_works(shims, root):
    """All sockets below /run/kata/<id> still have paths that the kernel takes."""
    length = 76 - len(shims("", None).name)
    with shims("x" * length, spec("sh", "-c", "exit 3", root=root)) as shim:
        assert len(shim.name) == 76
        shim.create()
        shim.api.call("Start", id=shim.name)
        assert shim.api.call("Wait", id=shim.name).exit_status == 3


def test_a_socket_directory_that_is_too_long_is_told(shims, root):
    shim = shims("long", spec("true", root=root), env={"KATASHIM_SOCKET_DIR": "/run/" + "x" * 80})
    done = shim.verb("start", check=False)
    assert done.returncode == 1
    assert b"socket path" in done.stderr and b"107" in done.stderr
    assert not os.path.exists("/run/" + "x" * 80)


def test_one_sandbox_id_cannot_be_two_vms(shims, root):
    """Two namespaces of containerd may use one id; /run/kata has no namespaces."""
    with shims("twin", spec(*FOREVER, root=root)) as first:
        first.create()
        vmm = pid_of(first.name, "QEMU")
        second = shims("other", spec(*FOREVER, root=root),
                       env={"KATASHIM_SOCKET_DIR": os.path.dirname(first.bundle) + "/s2"})
        second.name = first.name
        with second:
            error = refusal(second)
            assert error.code == errors.ALREADY_EXISTS and str(first.pid) in str(error)
        assert pid_of(first.name, "QEMU") == vmm
        assert first.api.call("State", id=first.name).status == 1
