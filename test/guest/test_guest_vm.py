"""The reference guest in a VM: what the agent does with devices, memory, cgroups, and the machine itself."""

import os
import socket
import threading

import pytest
from guest_vm import GUEST, GuestVm, busybox_disk, ext4_disk
from plain_client import Refused

from katashim.guest import build

pytestmark = [pytest.mark.vm, pytest.mark.skipif(not os.path.exists(f"{GUEST}/manifest.json"),
                                                 reason=f"no guest in {GUEST}")]


@pytest.fixture(scope="module")
def guest(tmp_path_factory):
    """A q35 guest with a pod in it."""
    directory = tmp_path_factory.mktemp("guest")
    words = "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all agent.debug_console " \
            "agent.debug_console_vport=1026 agent.log_vport=1025 agent.log=debug"
    vm = GuestVm(directory, words, busybox_disk(directory), default_maxmemory=1024, default_maxvcpus=2)
    try:
        vm.set_up(dns=["nameserver 192.0.2.1", " options ndots:1 "], storages=[
            {"driver": "ephemeral", "source": "shm", "fstype": "tmpfs",
             "mount_point": "/run/kata-containers/sandbox/shm", "options": ["mode=1777", "size=1048576"]}])
        yield vm
    finally:
        vm.end()


@pytest.fixture
def pod(guest):
    yield guest.pod
    guest.pod.remove_all()


@pytest.fixture
def client(guest):
    return guest.client()


def test_it_says_early_that_the_agent_starts(guest):
    assert "agent: starting" in guest.console()


def test_the_kernel_is_the_one_of_the_manifest(pod):
    cid = pod.run("sleep", "1000")
    release = build.read_manifest(GUEST)["kernel"]["release"]
    assert pod.output(cid, "busybox", "uname", "-r").strip() == release


def test_details_of_the_guest(client):
    details = client.call("GetGuestDetails", mem_block_size=True, mem_hotplug_probe=True)
    assert details.mem_block_size_bytes == 128 << 20
    assert details.agent_details.init_daemon
    assert details.agent_details.supports_seccomp
    assert {"blk", "virtio-fs", "ephemeral", "local",
            "overlayfs"} <= set(details.agent_details.storage_handlers)


def test_resolv_conf_is_the_hosts(guest):
    assert shell(guest, "cat /etc/resolv.conf") == "nameserver 192.0.2.1\noptions ndots:1\n"


def shell(guest, command):
    """What a command prints in the guest itself, by the debug console."""
    with guest.client(1026).connect() as console:
        console.sendall(f"stty -echo; PS1=; echo BEG''IN; {command}; echo EN''D; exit\n".encode())
        text = b""
        while piece := console.recv(4096):
            text += piece
    return text.decode().replace("\r\n", "\n").partition("BEGIN\n")[2].partition("END\n")[0]


def test_the_debug_console(guest):
    assert shell(guest, "echo $((6*7)); ls -d /usr/lib/katashim") == "42\n/usr/lib/katashim\n"


def test_the_root_is_read_only_and_the_usual_places_are_not(guest):
    assert "Read-only" in shell(guest, "touch /x")
    assert shell(guest,
                 "for d in /run /tmp /var/tmp /var/lib /dev/shm; do touch $d/x && echo $d; done").split() == [
        "/run", "/tmp", "/var/tmp", "/var/lib", "/dev/shm"]


def test_the_log_is_streamed_as_json_lines(guest):
    import json
    with guest.client(1025).connect() as stream:
        guest.client().call("ListRoutes")
        text = b""
        while b"ListRoutes" not in text or not text.endswith(b"\n"):
            text += stream.recv(65536)
    records = [json.loads(line) for line in text.splitlines()]
    assert {"msg", "level", "ts", "subsystem", "name", "source", "pid"} <= set(records[0])
    assert any("ListRoutes" in record["msg"] for record in records)


def test_an_oom_kill_is_told_once_and_ends_with_137(pod, client):
    told = []
    waiter = threading.Thread(target=lambda: told.append(client.call("GetOOMEvent",
                                                                     timeout_s=60).container_id))
    waiter.start()
    limits = {"Resources": {"Memory": {"Limit": 16 << 20, "Swap": 16 << 20}}}
    cid = pod.run("sh", "-c", "busybox tail /dev/zero; exit $?", linux=limits)
    assert pod.wait(cid) in (137, 9)
    waiter.join(30)
    assert told == [cid]


def test_limits_are_set_and_changed(guest, pod, client):
    limits = {"Resources": {"Memory": {"Limit": 64 << 20}, "Pids": {"Limit": 50}, "CPU": {"Shares": 512}}}
    cid = pod.run("sleep", "1000", linux=limits)
    stats = client.call("StatsContainer", container_id=cid).cgroup_stats
    assert stats.memory_stats.usage.limit == 64 << 20
    assert stats.memory_stats.usage.usage > 0
    assert (stats.pids_stats.limit, stats.pids_stats.current) == (50, 1)
    client.call("UpdateContainer", container_id=cid, resources={
        "Memory": {"Limit": 32 << 20}, "CPU": {"Quota": 50000, "Period": 100000}})
    stats = client.call("StatsContainer", container_id=cid).cgroup_stats
    assert stats.memory_stats.usage.limit == 32 << 20
    assert shell(guest, f"cat /sys/fs/cgroup/katashim-test/{cid}/cpu.max") == "50000 100000\n"
    with pytest.raises(Refused):
        client.call("UpdateContainer", container_id=cid, resources={"CPU": {"Cpus": "99"}})


def test_a_disk_is_plugged_used_and_unplugged(guest, pod, tmp_path):
    disk = guest.machine.vm.add_device(ext4_disk(tmp_path, "hot", megabytes=8))
    place = "/run/kata-containers/sandbox/hot"
    cid = pod.run("sleep", "1000", storages=[guest.storage(disk, place)], mounts=[
        {"destination": "/hot", "type": "bind", "source": place, "options": ["rbind"]}])
    assert "lost+found" in pod.output(cid, "ls", "/hot")
    assert pod.output(cid, "sh", "-c", "echo kept > /hot/f; sync; cat /hot/f") == "kept\n"
    pod.remove(cid)
    guest.machine.vm.remove_device(disk)
    assert place not in shell(guest, "cat /proc/mounts")


def test_a_disk_as_a_device_of_the_container(guest, pod, tmp_path):
    disk = guest.machine.vm.add_device(ext4_disk(tmp_path, "raw", megabytes=4))
    cid = pod.run("sh", "-c", "head -c 1082 /dev/data | busybox tail -c 2 | busybox od -An -tx1",
                  linux={"Devices": [{"Path": "/dev/data", "Type": "b", "Major": 8, "Minor": 99}]},
                  devices=[{"id": disk.guest_address, "type": "blk", "container_path": "/dev/data"}])
    assert pod.read(cid).split() == [b"53", b"ef"]
    pod.remove(cid)
    guest.machine.vm.remove_device(disk)


def test_cpus_and_memory_are_brought_online(guest, client):
    before = int(shell(guest, "awk '/MemTotal/ {print $2}' /proc/meminfo"))
    guest.machine.vm.resize_memory(768)
    assert guest.machine.vm.resize_vcpus(2) == 2
    client.call("OnlineCPUMem", nb_cpus=2)
    assert int(shell(guest, "awk '/MemTotal/ {print $2}' /proc/meminfo")) >= before + (200 << 10)
    assert shell(guest, "cat /sys/devices/system/cpu/online") == "0-1\n"
    with pytest.raises(Refused, match="failed to online 9 CPUs"):
        client.call("OnlineCPUMem", nb_cpus=9, timeout_s=60)


def test_the_firewall(client):
    rules = b"*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n" \
            b"-A INPUT -p tcp -m tcp --dport 7 -j DROP\nCOMMIT\n"
    client.call("SetIPTables", data=rules)
    assert b"-A INPUT -p tcp -m tcp --dport 7 -j DROP" in client.call("GetIPTables").data
    client.call("GetIPTables", is_ipv6=True)


def test_the_clock_and_the_random_numbers(guest, client):
    client.call("SetGuestDateTime", Sec=1_900_000_000, Usec=500_000)
    assert 1_900_000_000 <= int(shell(guest, "date +%s")) < 1_900_000_060
    client.call("ReseedRandomDev", data=os.urandom(64))


def test_metrics_of_agent_and_guest(client):
    text = client.call("GetMetrics").metrics
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['kata_guest_meminfo{item="memtotal"}']) > 300 << 20
    assert float(values["kata_agent_threads"]) > 1
    assert {"kata_agent_scrape_count", "kata_agent_total_rss", 'kata_guest_load{item="load1"}',
            'kata_guest_cpu_time{cpu="total",item="user"}'} <= set(values)


def test_seccomp_filters_work(pod):
    filters = {"DefaultAction": "SCMP_ACT_ALLOW", "Architectures": ["SCMP_ARCH_X86_64"],
               "Syscalls": [{"Names": ["mkdir", "mkdirat"], "Action": "SCMP_ACT_ERRNO", "errnoret": 38}]}
    cid = pod.run("sleep", "1000", linux={"Seccomp": filters})
    assert "not implemented" in pod.output(cid, "sh", "-c", "mkdir /tmp/x 2>&1; true")


def test_destroying_the_sandbox_ends_the_machine(tmp_path):
    vm = GuestVm(tmp_path)
    try:
        vm.client().call("CreateSandbox", sandbox_id="the-pod")
        vm.client().call("DestroySandbox")
        ended = vm.machine.vm.wait(20)
        assert ended is not None, vm.console()
        assert ended.status == 0, ended
    finally:
        vm.end()


def test_cgroup_version_1_and_a_microvm(tmp_path):
    vm = GuestVm(tmp_path, "", busybox_disk(tmp_path), machine_type="microvm")
    try:
        vm.set_up()
        pod, client = vm.pod, vm.client()
        cid = pod.run("sleep", "1000", linux={"Resources": {"Memory": {"Limit": 64 << 20}}})
        assert pod.output(cid, "cat", "/proc/self/cgroup").count(f"/katashim-test/{cid}") > 3
        stats = client.call("StatsContainer", container_id=cid).cgroup_stats
        assert stats.memory_stats.usage.limit == 64 << 20
        assert stats.cpu_stats.cpu_usage.total_usage > 0
        client.call("PauseContainer", container_id=cid)
        client.call("ResumeContainer", container_id=cid)
        exec_id = pod.execute(cid, "sleep", "1000")
        client.call("SignalProcess", container_id=cid, signal=9)
        assert (pod.wait(cid), pod.wait(cid, exec_id)) == (137, 137)
        killed = pod.run("busybox", "tail", "/dev/zero",
                         linux={"Resources": {"Memory": {"Limit": 16 << 20, "Swap": 16 << 20}}})
        assert client.call("GetOOMEvent", timeout_s=60).container_id == killed
        assert pod.wait(killed) == 137
        pod.remove_all()
        client.call("DestroySandbox")
        assert vm.machine.vm.wait(20) is not None, vm.console()
    finally:
        vm.end()


def test_a_setting_that_is_impossible_is_told_on_the_console_and_ends_the_machine(tmp_path):
    vm = GuestVm(tmp_path, "agent.log=loud", answers=False)
    try:
        vm.wait_for_console("BadSetting: agent.log=loud: there is no log level 'loud'")
        assert vm.machine.vm.wait(20) is not None
    finally:
        vm.end()


def test_the_host_may_hang_up_at_any_time(guest, client):
    for _ in range(5):
        with client.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(b"\0\0\0\5")
    assert client.call("ListInterfaces").Interfaces
