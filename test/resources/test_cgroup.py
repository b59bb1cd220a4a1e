import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katashim import undo
from katashim.errors import FailedPrecondition, InvalidArgument, Unavailable
from katashim.resources import cgroup, cgroupfs, mounts
from katashim.resources.releases import RELEASES

ONLY, OVERHEAD = SimpleNamespace(sandbox_cgroup_only=True), SimpleNamespace(sandbox_cgroup_only=False)
HIERARCHIES = cgroupfs.hierarchies()
V1 = [hierarchy for hierarchy in HIERARCHIES if hierarchy.version == 1]
needs_cpuset = pytest.mark.skipif(not any("cpuset" in each.controllers for each in HIERARCHIES),
                                  reason="this host has no cpuset controller")


@pytest.fixture
def name():
    """A cgroup path of this test's own; afterwards nothing of that name may be there."""
    name = f"katashim-test-{os.getpid()}-{os.urandom(3).hex()}"
    yield name
    left = [directory for hierarchy in HIERARCHIES for directory, _, _ in os.walk(hierarchy.root, topdown=False)
            if name in directory]
    for directory in left:
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    assert not left


@pytest.fixture
def process():
    """A process that may be moved about."""
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


def stack(journal=None):
    return undo.Undo(None if journal is None else str(journal), RELEASES)


def end(child):
    child.kill()
    child.wait()


def where(number, task=None):
    """The cgroup paths that a process (or its thread `task`) is in, of the hierarchies with controllers."""
    path = f"/proc/{number}/cgroup" if task is None else f"/proc/{number}/task/{task}/cgroup"
    with open(path) as lines:
        rows = [line.rstrip("\n").split(":", 2) for line in lines]
    v2 = any(hierarchy.version == 2 for hierarchy in HIERARCHIES)
    return {row[2].lstrip("/") for row in rows if (row[1] and not row[1].startswith("name=")) or (not row[1] and v2)}


def directories(path):
    return [hierarchy.directory(path) for hierarchy in HIERARCHIES if os.path.isdir(hierarchy.directory(path))]


# -- the sandbox's cgroups ----------------------------------------------------------------------------

def test_with_one_cgroup_all_helpers_are_in_it(name, process):
    sandbox = cgroup.SandboxCgroup("s1", f"/{name}/s1", ONLY, stack())
    assert (sandbox.path, sandbox.overhead_path) == (f"{name}/s1", None)
    before = where(process.pid)
    sandbox.enter(process.pid)
    assert where(process.pid) == {f"{name}/s1"} != before
    sandbox.place_vmm([process.pid], {0: 1})
    end(process)
    sandbox.remove()
    assert directories(name) == []
    sandbox.remove()


def test_without_it_only_the_vcpus_are_in_the_pods_cgroup(name):
    program = """
import sys, threading
threads = [threading.Thread(target=sys.stdin.read) for _ in range(2)]
for thread in threads: thread.start()
print(*[thread.native_id for thread in threads], flush=True)
"""
    vmm = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        vcpus = [int(word) for word in vmm.stdout.readline().split()]
        sandbox = cgroup.SandboxCgroup(name, name + "/pod", OVERHEAD, stack())
        overhead = f"kata_overhead/{name}"
        assert sandbox.overhead_path == overhead
        sandbox.enter(vmm.pid)
        assert where(vmm.pid) == {overhead}
        sandbox.place_vmm([vmm.pid, 1], dict(enumerate(vcpus)))
        v1 = {name + "/pod"} if V1 else set()
        v2 = {name + "/pod"} if len(V1) < len(HIERARCHIES) else set()
        assert where(vmm.pid) == v2 | ({overhead} if V1 else set())
        for vcpu in vcpus:
            assert where(vmm.pid, vcpu) == v1 | v2
    finally:
        vmm.communicate()
    sandbox.remove()
    assert directories(name) == directories(overhead) == []


def test_a_process_that_dies_is_waited_for(name, process):
    sandbox = cgroup.SandboxCgroup("s1", name, ONLY, stack())
    sandbox.enter(process.pid)
    process.kill()              # its end is not awaited here: removal has to
    sandbox.remove()
    assert directories(name) == []


def test_a_process_that_stays_is_named(name, process):
    sandbox = cgroup.SandboxCgroup("s1", name, ONLY, stack())
    sandbox.enter(process.pid)
    with pytest.raises(Unavailable, match=f"{name} cannot be removed: it holds the processes .{process.pid}"):
        cgroup.remove_path(name, wait_s=0.05)
    end(process)
    sandbox.remove()


def test_the_shim_moves_itself_out(name):
    program = f"""
import os
from types import SimpleNamespace
from katashim import undo
from katashim.resources import cgroup
stack = undo.Undo(None, {{"cgroup": cgroup.remove_path}})
sandbox = cgroup.SandboxCgroup("s1", "{name}/a/b", SimpleNamespace(sandbox_cgroup_only=True), stack)
sandbox.enter(os.getpid())
assert "{name}/a/b" in open("/proc/self/cgroup").read()
assert stack.unwind() == []
assert "{name}" not in open("/proc/self/cgroup").read()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30,
                   env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert directories(name) == []


def test_a_process_that_is_gone_leaves_nothing_behind(name, process):
    end(process)
    undo_stack = stack()
    with pytest.raises(FailedPrecondition, match=f"cannot put {process.pid} into the cgroup"):
        cgroup.SandboxCgroup(name, name, OVERHEAD, undo_stack).enter(process.pid)
    assert undo_stack.entries() == [] and directories(name) == directories(f"kata_overhead/{name}") == []


def test_replay_after_a_killed_shim(name, process, tmp_path):
    journal = tmp_path / "journal"
    cgroup.SandboxCgroup(name, name, OVERHEAD, stack(journal)).enter(process.pid)
    end(process)
    assert directories(name)
    for _ in range(2):
        assert undo.replay(str(journal), RELEASES) == []
        assert directories(name) == directories(f"kata_overhead/{name}") == []


def test_a_shared_parent_goes_with_the_last_sandbox(name):
    first, second = (cgroup.SandboxCgroup(key, f"/{name}/ns/{key}", ONLY, stack()) for key in ("s1", "s2"))
    for sandbox in (first, second):
        cgroupfs.create(sandbox.path)
    cgroup.remove_path(first.path)
    assert directories(second.path) and not directories(first.path)
    cgroup.remove_path(second.path)
    assert directories(name) == []


def test_what_was_there_before_stays(name):
    made = [hierarchy.directory(f"{name}/pod") for hierarchy in HIERARCHIES]
    for directory in made:
        os.makedirs(directory)
    try:
        cgroupfs.create(f"{name}/pod/s1")
        cgroup.remove_path(f"{name}/pod/s1")
        assert directories(f"{name}/pod/s1") == [] and directories(f"{name}/pod") == made
        cgroupfs.create(f"{name}/pod")
        cgroup.remove_path(f"{name}/pod")
        assert directories(f"{name}/pod") == made
    finally:
        for directory in made:
            os.removedirs(directory)


def test_what_a_maker_was_killed_over_is_removed_by_the_journal(name):
    """It had been made, but not marked yet."""
    undo_stack = stack()
    new = cgroupfs.missing(name)
    undo_stack.push("cgroup", path=name, new=new)
    os.mkdir(new[0])
    cgroup.remove_path(name)
    assert directories(name) == new[:1]         # without the journal it is a stranger's
    assert undo_stack.unwind() == []
    assert directories(name) == []


@pytest.mark.parametrize("path", ["", "/", "no-such-cgroup-here/at-all"])
def test_removing_nothing_is_no_error(path):
    cgroup.remove_path(path)


# -- paths --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given_path, path", [
    ("/default/c1", "default/c1"), ("a//b/./c/", "a/b/c"), ("", ""), ("/", ""),
    ("kubepods-besteffort-pod1.slice:cri-containerd:abc",
     "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-abc.scope"),
    ("system.slice:docker:abc", "system.slice/docker-abc.scope"),
    (":docker:abc", "system.slice/docker-abc.scope"), ("-.slice:docker:abc", "docker-abc.scope"),
    ("user.slice::abc", "user.slice/abc.scope"), ("a.slice:x:my.slice", "a.slice/my.slice")])
def test_paths(given_path, path):
    assert cgroup.cgroup_path(given_path) == path


@pytest.mark.parametrize("path", [
    "/a/../b", "..", "a/..", "a\0b", "a\nb", "nodots:docker:abc", "a--b.slice:docker:abc", "-a.slice:docker:abc",
    ".slice:docker:abc", "a.slice:../b:c", "a.slice:b:../../c", "a/b.slice:c:d", "a.slice:b:"])
def test_impossible_paths_are_refused(path):
    with pytest.raises(InvalidArgument):
        cgroup.SandboxCgroup("s1", path, ONLY, stack())


def test_paths_without_a_spec():
    sandbox = cgroup.SandboxCgroup("s1", None, OVERHEAD, stack())
    assert (sandbox.path, sandbox.overhead_path) == ("kata_sandboxed_pod/s1", "kata_overhead/s1")
    sandbox = cgroup.SandboxCgroup("s1", "a.slice:b:c", OVERHEAD, stack())
    assert sandbox.overhead_path == "kata.slice/kata-overhead.slice/runtime-rs-s1.scope"


# -- cpusets ------------------------------------------------------------------------------------------

def cpuset(path, which):
    hierarchy = next(each for each in HIERARCHIES if "cpuset" in each.controllers)
    # v2's cpuset.cpus is what was asked for, empty by default.
    name = f"cpuset.{which}" if hierarchy.version == 1 else f"cpuset.{which}.effective"
    with open(f"{hierarchy.directory(path)}/{name}") as file:
        return file.read().strip()


@needs_cpuset
def test_the_cpuset_is_the_union_of_the_containers(name, process):
    sandbox = cgroup.SandboxCgroup("s1", name, ONLY, stack())
    sandbox.enter(process.pid)
    everything = cpuset("", "cpus")
    assert cpuset(name, "cpus") == everything
    first, last = min(cgroup.parse_cpus(everything)), max(cgroup.parse_cpus(everything))
    sandbox.update_cpuset("c1", str(first), "0")
    assert (cpuset(name, "cpus"), cpuset(name, "mems")) == (str(first), "0")
    assert os.sched_getaffinity(process.pid) == {first}
    sandbox.update_cpuset("c2", str(last))
    assert cgroup.parse_cpus(cpuset(name, "cpus")) == {first, last}
    sandbox.update_cpuset("c1")
    assert cgroup.parse_cpus(cpuset(name, "cpus")) == {last}
    with pytest.raises(InvalidArgument, match="cpuset.cpus of .* to '.*4000'"):
        sandbox.update_cpuset("c3", "4000")
    sandbox.update_cpuset("c2")
    assert cpuset(name, "cpus") == everything
    end(process)
    sandbox.remove()


@given(st.sets(st.integers(0, 300)))
def test_lists_of_cpus_come_back_as_they_were(numbers):
    assert cgroup.parse_cpus(cgroup.format_cpus(numbers)) == numbers


def test_lists_of_cpus():
    assert cgroup.parse_cpus(" 0-3,7, 9-9\n") == {0, 1, 2, 3, 7, 9}
    assert cgroup.format_cpus({0, 1, 2, 5, 7, 8}) == "0-2,5,7-8"
    for bad in ("a", "1-", "-1", "3-1", "1,,2", "0-4000000000", "0x1"):
        with pytest.raises(InvalidArgument, match="not a list"):
            cgroup.parse_cpus(bad)


# -- figures ------------------------------------------------------------------------------------------

def test_figures_of_a_living_sandbox(name):
    program = """
import sys, time
sys.stdin.readline()
block = bytearray(b"x") * (16 << 20)
while time.process_time() < 0.05: pass
print("ready", flush=True)
sys.stdin.readline()
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        sandbox = cgroup.SandboxCgroup(name, name, OVERHEAD, stack())
        sandbox.enter(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "ready\n"
        figures = sandbox.metrics()
    finally:
        child.communicate()
    assert figures.sandbox.tasks == 0 and figures.overhead.tasks == 1
    assert 16 << 20 <= figures.overhead.memory_bytes <= figures.overhead.memory_peak_bytes < 64 << 20
    assert 10_000_000 < figures.overhead.cpu_ns < 5_000_000_000
    sandbox.remove()


def test_figures_of_cgroup_v2(tmp_path):
    for file, text in (("memory.current", "4096\n"), ("memory.peak", "8192\n"), ("pids.current", "3\n"),
                       ("cpu.stat", "usage_usec 1234567\nuser_usec 1000000\nsystem_usec 234567\n")):
        (tmp_path / file).write_text(text)
    assert cgroupfs.Figures(**cgroupfs._v2_figures(str(tmp_path))) == (4096, 8192, 1234567000, 3)


def test_figures_that_a_host_does_not_count(tmp_path):
    for read in (cgroupfs._v1_figures, cgroupfs._v2_figures):
        assert cgroupfs.Figures(**read(str(tmp_path))) == (None, None, None, None)


# -- hierarchies --------------------------------------------------------------------------------------

def table(*rows):
    lines = [f"{31 + number} 23 0:{device} / {target} rw,relatime - {fstype} {fstype} {options}"
             for number, (device, target, fstype, options) in enumerate(rows)]
    return mounts.parse_table("\n".join(lines))


def test_hierarchies_of_v1_with_joined_controllers_and_systemd(tmp_path):
    found = cgroupfs.hierarchies(table(
        (5, "/proc", "proc", "rw"), (30, "/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct"),
        (31, "/sys/fs/cgroup/memory", "cgroup", "rw,xattr,memory"), (31, "/mnt/again", "cgroup", "rw,xattr,memory"),
        (32, "/sys/fs/cgroup/systemd", "cgroup", "rw,xattr,name=systemd"), (33, str(tmp_path), "cgroup2", "rw")))
    assert found == [("/sys/fs/cgroup/cpu,cpuacct", 1, {"cpu", "cpuacct"}), ("/sys/fs/cgroup/memory", 1, {"memory"})]


def test_hierarchies_of_a_hybrid_host_include_v2_where_it_has_controllers(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("hugetlb\n")
    found = cgroupfs.hierarchies(table((31, "/sys/fs/cgroup/memory", "cgroup", "rw,memory"),
                                       (33, str(tmp_path), "cgroup2", "rw")))
    assert found == [("/sys/fs/cgroup/memory", 1, {"memory"}), (str(tmp_path), 2, {"hugetlb"})]


def test_hierarchies_of_v2_alone(tmp_path):
    rows = table((33, str(tmp_path), "cgroup2", "rw"))
    assert cgroupfs.hierarchies(rows) == [(str(tmp_path), 2, set())]
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    assert cgroupfs.hierarchies(rows) == [(str(tmp_path), 2, {"cpuset", "cpu", "io", "memory", "pids"})]


def test_a_host_without_cgroups():
    with pytest.raises(FailedPrecondition, match="no control groups"):
        cgroupfs.hierarchies(table((5, "/proc", "proc", "rw")))
