"""The verb start, by the real program: what it prints, what it leaves, what it imports."""

import os
import socket
import subprocess
import sys
import venv

import pytest

from katashim.shim import endpoint
from katashim.ttrpc import proto

from .conftest import PROGRAM, ROOT, flags_for

Params = proto.get("containerd.runtime.bootstrap.v1.BootstrapParams")
Result = proto.get("containerd.runtime.bootstrap.v1.BootstrapResult")

# Extension modules that the start path may use; no module in Python but our own.
C_MODULES = {"_socket", "_json", "_sha256", "_sha2", "errno", "select", "fcntl", "math", "array"}

MEMBER = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s1"}


def path_of(shims, sandbox_id):
    return endpoint.socket_path(shims.socket_dir, "/run/c.sock", "k8s.io", sandbox_id)


def read(bundle, name):
    with open(os.path.join(bundle, name)) as file:
        return file.read()


@pytest.fixture
def sandbox(shims):
    """The socket of sandbox s1, with somebody listening."""
    listener = endpoint.listen(path_of(shims, "s1"))
    yield path_of(shims, "s1")
    listener.close()


# -- what it prints and leaves --------------------------------------------------------------------
def test_start_prints_the_address_and_nothing_else(shims):
    bundle = shims.bundle("c1")
    done = shims.start("c1", bundle)
    address = "unix://" + path_of(shims, "c1")
    assert (done.returncode, done.stdout, done.stderr) == (0, address.encode(), b"")
    assert read(bundle, "address") == address
    assert int(read(bundle, "shim.pid")) > 1
    assert sorted(os.listdir(bundle)) == ["address", "config.json", "log", "shim.pid"]


def test_a_silent_stdin_does_not_hold_it_up(shims):
    bundle = shims.bundle("c1")
    reader, writer = os.pipe()
    try:
        done = subprocess.run([PROGRAM, *flags_for("c1"), "start"], cwd=bundle, stdin=reader, timeout=10,
                              env={"KATASHIM_SOCKET_DIR": shims.socket_dir}, capture_output=True, check=False)
        shims.run(bundle, "-v")         # has the daemon taken note of
    finally:
        os.close(reader)
        os.close(writer)
    assert done.stdout.decode() == "unix://" + path_of(shims, "c1")


def test_many_starts_at_once_print_the_same_address(shims):
    bundle = shims.bundle("c1")
    # A socket that somebody listens on: which of them is the first is then decided already.
    listener = endpoint.listen(path_of(shims, "c1"))
    command = [PROGRAM, *flags_for("c1"), "start"]
    running = [subprocess.Popen(command, cwd=bundle, env={"KATASHIM_SOCKET_DIR": shims.socket_dir},
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) for _ in range(4)]
    answers = {each.communicate(timeout=30)[0] for each in running}
    listener.close()
    assert answers == {b"unix://" + path_of(shims, "c1").encode()}
    assert not os.path.exists(os.path.join(bundle, "shim.pid"))


def test_a_stale_socket_is_replaced(shims):
    bundle = shims.bundle("c1")
    endpoint.listen(path_of(shims, "c1")).close()
    stale = endpoint.identity(path_of(shims, "c1"))
    os.link(path_of(shims, "c1"), path_of(shims, "c1") + ".old")    # keeps the inode's number taken
    assert shims.start("c1", bundle).returncode == 0
    assert endpoint.identity(path_of(shims, "c1")) != stale
    assert shims.daemon_pid(bundle) is not None


# -- pods -----------------------------------------------------------------------------------------
def test_a_pods_container_gets_its_sandboxs_address_and_no_process(shims, sandbox):
    bundle = shims.bundle("c2", MEMBER)
    done = shims.start("c2", bundle)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"unix://{sandbox}".encode(), b"")
    assert read(bundle, "address") == f"unix://{sandbox}"
    assert not os.path.exists(os.path.join(bundle, "shim.pid"))
    assert shims.sockets() == [sandbox]


def test_a_pods_container_without_its_sandboxs_shim_is_refused(shims):
    bundle = shims.bundle("c2", MEMBER)
    done = shims.start("c2", bundle)
    assert_refused(shims, done, bundle, "belongs to sandbox s1, which has no running shim")


# -- parameters on stdin --------------------------------------------------------------------------
def test_containerd_2_3_gets_a_protobuf_result_in_its_own_directory(shims, sandbox):
    bundle = shims.bundle("c2", MEMBER)
    params = Params(instance_id="c2", namespace="k8s.io", containerd_version="v2.3.0",
                    socket_dir=shims.socket_dir)
    done = shims.start("c2", bundle, stdin=params.SerializeToString(),
                       environment={"KATASHIM_SOCKET_DIR": None})
    assert done.returncode == 0 and done.stderr == b""
    result = Result.FromString(done.stdout)
    assert (result.version, result.address, result.protocol) == (3, f"unix://{sandbox}", "ttrpc")


def test_parameters_alone_are_enough(shims, sandbox):
    bundle = shims.bundle("c2", MEMBER)
    params = Params(instance_id="c2", namespace="k8s.io", containerd_grpc_address="/run/c.sock")
    done = shims.run(bundle, "start", stdin=params.SerializeToString())
    assert (done.stdout, done.stderr) == (f"unix://{sandbox}".encode(), b"")


def test_runtime_options_on_stdin_are_left_alone(shims, sandbox):
    bundle = shims.bundle("c2", MEMBER)
    options = proto.get("google.protobuf.Any")(type_url="runtimeoptions.v1.Options", value=b"\x12\x02/a")
    done = shims.start("c2", bundle, stdin=options.SerializeToString())
    assert done.stdout == f"unix://{sandbox}".encode()


def test_a_caller_that_knows_version_3_gets_json(shims, sandbox):
    bundle = shims.bundle("c2", MEMBER)
    done = shims.start("c2", bundle, environment={"MAX_SHIM_VERSION": "3"})
    assert done.stdout == f'{{"version":3,"address":"unix://{sandbox}","protocol":"ttrpc"}}'.encode()


# -- refusals -------------------------------------------------------------------------------------
def assert_refused(shims, done, bundle, text):
    """The reason on stderr, nothing on stdout, a status that is not 0, and nothing left."""
    assert done.returncode == 1
    assert done.stdout == b""
    assert text in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1
    assert shims.sockets() == []
    assert sorted(os.listdir(bundle)) == ["config.json", "log"]


@pytest.mark.parametrize("config, text", [
    ("{", "config.json is not JSON"), ("", "config.json is not JSON"), ("[]", "not an OCI runtime spec"),
    ('{"annotations": {"io.kubernetes.cri.container-type": "container"}}', "names the sandbox")])
def test_a_broken_bundle_is_refused(shims, config, text):
    bundle = shims.bundle("c1", config=config)
    assert_refused(shims, shims.start("c1", bundle), bundle, text)


@pytest.mark.parametrize("container_id, text", [
    ("../../etc", "id '../../etc' is not valid"), ("x" * 77, "at most 76"), ("", "-id is missing")])
def test_an_id_that_is_none_is_refused(shims, container_id, text):
    bundle = shims.bundle("c1")
    assert_refused(shims, shims.start(container_id, bundle), bundle, text)


def test_a_namespace_is_needed(shims):
    bundle = shims.bundle("c1")
    assert_refused(shims, shims.run(bundle, "-id", "c1", "start"), bundle, "-namespace is missing")


def test_an_unknown_flag_is_refused(shims):
    bundle = shims.bundle("c1")
    assert_refused(shims, shims.run(bundle, "-wat", "start"), bundle, "unknown flag '-wat'")


def test_a_socket_path_that_is_too_long_is_refused(shims):
    bundle = shims.bundle("c1")
    done = shims.start("c1", bundle, environment={"KATASHIM_SOCKET_DIR": "/tmp/" + "d" * 60})
    assert_refused(shims, done, bundle, "the kernel allows 107")


def test_a_bundle_that_cannot_be_written_leaves_no_socket(shims):
    bundle = shims.bundle("c1")
    done = shims.run(bundle, *flags_for("c1"), "-bundle", "/nowhere", "start")
    assert_refused(shims, done, bundle, "cannot write /nowhere/address")


def test_an_interpreter_without_the_packages_is_refused_by_name(shims, tmp_path):
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False, symlinks=True)
    bundle = shims.bundle("c1")
    done = shims.start("c1", bundle, environment={"KATASHIM_PYTHON": str(bare / "bin" / "python")})
    assert_refused(shims, done, bundle, "has no gevent, google/protobuf")


# -- what it imports ------------------------------------------------------------------------------
def test_the_start_path_imports_only_c_modules(shims, tmp_path):
    bundle = shims.bundle("c1", {"some": "annotation"})
    look = tmp_path / "look.py"
    look.write_text(
        f"import sys\nbefore = set(sys.modules)\nsys.path.insert(0, {ROOT!r})\n"
        "from katashim.shim import main, start\nfrom katashim.shim.flags import parse\n"
        f"start.start(parse({[*flags_for('c1'), 'start']!r}))\n"
        "print(*[name for name in sys.modules if name not in before and not name.startswith('katashim')])\n")
    done = subprocess.run([sys.executable, "-IS", look], cwd=bundle, capture_output=True, timeout=30, check=True,
                          env={"KATASHIM_SOCKET_DIR": shims.socket_dir}, input=b"\x0a\x02hi")
    shims.run(bundle, "-v")             # has the daemon taken note of
    assert set(done.stdout.decode().split()) <= C_MODULES


# -- the other verbs of the program ---------------------------------------------------------------
def test_version_info_and_help(shims, tmp_path):
    version = shims.run(tmp_path, "-v")
    assert version.stdout.startswith(b"containerd-shim-katashim-v2 ") and version.returncode == 0
    info = proto.get("containerd.types.RuntimeInfo").FromString(shims.run(tmp_path, "-info").stdout)
    assert info.name == "io.containerd.katashim.v2"
    assert info.version.version in version.stdout.decode()
    assert info.annotations == {"containerd.io/runtime-allow-mounts": "erofs"}
    assert b"usage: containerd-shim-katashim-v2" in shims.run(tmp_path, "-help").stdout


def test_the_program_finds_itself_through_a_link(shims, tmp_path):
    link = tmp_path / "linked"
    link.symlink_to(PROGRAM)
    assert subprocess.run([link, "-v"], capture_output=True, check=True).stdout.startswith(b"containerd-shim")


def test_a_reader_that_is_gone_is_no_traceback(tmp_path):
    ours, theirs = socket.socketpair()
    ours.close()
    done = subprocess.run([PROGRAM, "-help"], stdout=theirs, stderr=subprocess.PIPE, check=False)
    theirs.close()
    assert (done.returncode, done.stderr) == (1, b"")
