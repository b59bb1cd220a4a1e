"""Again and again: what each round leaves behind adds up, so it must be nothing."""

import os

import pytest
from direct_shim import exec_request, make_root, spec
from harness import leaks
from live_pods import FOREVER, api_of, pid_of

from katashim import undo

pytestmark = pytest.mark.vm

_RSS_GROWTH_KB = 1500       # of a shim over a hundred rounds: the allocator's, not ours


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(str(tmp_path_factory.mktemp("root") / "fs"))


def rss_kb(pid):
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024


def one_round(shim, number, root):
    """Create a member, execute in it, delete both."""
    api, member = shim.api, f"{shim.name}-m{number}"
    marks = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": shim.name}
    bundle = f"{shim.bundle}-m"
    if not os.path.exists(bundle):
        shim.write_bundle(bundle, spec(*FOREVER, root=root, annotations=marks))
    shim.create(member, bundle=bundle)
    api.call("Start", id=member)
    api.call("Exec", id=member, exec_id="e", **exec_request("sh", "-c", f"exit {number % 200}"))
    api.call("Start", id=member, exec_id="e")
    assert api.call("Wait", id=member, exec_id="e").exit_status == number % 200
    api.call("Delete", id=member, exec_id="e")
    api.call("Kill", id=member, signal=9)
    assert api.call("Wait", id=member).exit_status == 137
    api.call("Delete", id=member)


def test_fifty_rounds_in_one_vm_leave_nothing_in_it(shims, root):
    with shims("rounds", spec(*FOREVER, root=root)) as shim:
        shim.create()
        shim.api.call("Start", id=shim.name)
        for number in range(10):
            one_round(shim, number, root)           # until everything that is lazy has happened once
        picture = traces(shim)
        rss = rss_kb(shim.pid)
        for number in range(10, 60):
            one_round(shim, number, root)
        assert traces(shim) == picture
        assert rss_kb(shim.pid) - rss < _RSS_GROWTH_KB


def traces(shim):
    """What a round could leave on the host: descriptors, threads, mounts, acquired things, shared files."""
    share = f"/run/kata-containers/shared/sandboxes/{shim.name}"
    with open(f"/proc/{shim.pid}/mountinfo") as table:
        mounts = sorted(line.split()[4] for line in table)
    journal = undo.read(f"/run/kata/{shim.name}/journal")[1]
    return {"descriptors": leaks.open_fds(shim.pid), "mounts": mounts,
            "acquired": [entry[1:] for entry in journal],
            "shared": sorted(os.listdir(f"/proc/{shim.pid}/root{share}/rw/passthrough")),
            "vsock": leaks.open_fds(pid_of(shim.name, "vsock"))}


def test_the_guest_is_left_with_nothing_either(daemon, pod, name):
    def guest():
        script = "wc -l </proc/mounts; ls /proc | grep -c '^[0-9]'; ls /sys/fs/cgroup 2>/dev/null | wc -l"
        return daemon.ctr("task", "exec", "--exec-id", name("e"), pod.name, "sh", "-c", script).out
    pod.run(name(), "true", options=["--rm"])
    before = guest()
    for _ in range(5):
        pod.run(name(), "true", options=["--rm"])
    assert guest() == before


def test_execs_of_one_container_do_not_add_up(daemon, pod, name):
    with api_of(daemon, pod.name) as api:
        def one(number):
            exec_id = f"x{number}"
            api.call("Exec", id=pod.name, exec_id=exec_id, **exec_request("true"))
            api.call("Start", id=pod.name, exec_id=exec_id)
            api.call("Wait", id=pod.name, exec_id=exec_id)
            api.call("Delete", id=pod.name, exec_id=exec_id)
        pid = api.call("Connect", id=pod.name).shim_pid
        for number in range(5):
            one(number)
        before = leaks.open_fds(pid)
        for number in range(5, 45):
            one(number)
        assert leaks.open_fds(pid) == before


@pytest.mark.soak
def test_two_hundred_vms_one_after_the_other(daemon, name):
    container = name()
    for number in range(200):
        daemon.run(container, *FOREVER, options=["-d"])
        said = daemon.ctr("task", "exec", "--exec-id", name("e"), container, "echo", str(number)).out
        assert said == f"{number}\n"
        daemon.ctr("task", "rm", "-f", container)
        daemon.ctr("container", "rm", container)


@pytest.mark.soak
def test_five_vms_at_once_forty_times(daemon, name):
    for _ in range(40):
        running = [daemon.start_run(name(), "sh", "-c", f"exit {number}", options=["--rm"])
                   for number in range(1, 6)]
        assert [one.wait(180).code for one in running] == [1, 2, 3, 4, 5]


@pytest.mark.soak
def test_a_thousand_rounds_in_one_vm(shims, root):
    with shims("many", spec(*FOREVER, root=root)) as shim:
        shim.create()
        shim.api.call("Start", id=shim.name)
        for number in range(50):
            one_round(shim, number, root)
        picture, rss = traces(shim), rss_kb(shim.pid)
        for number in range(50, 1050):
            one_round(shim, number, root)
        assert traces(shim) == picture
        assert rss_kb(shim.pid) - rss < 2 * _RSS_GROWTH_KB
