"""The QEMU driver with the real QEMU and a guest of fifty bytes: life, death, devices, errors."""

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import time

import gevent
import pytest
from gevent.event import Event
from qemu_vm import GREETING, LONG, Machine, disk, disk_file, tiny_settings

from katashim import child, host
from katashim.drivers import base, qemu_hotplug
from katashim.errors import (
    AlreadyExists,
    ConfigError,
    ConnectionClosed,
    DeadlineExceeded,
    FailedPrecondition,
    HypervisorError,
    NotFound,
    QmpError,
    ResourceExhausted,
    Unsupported,
)


@pytest.fixture
def machine(tmp_path):
    """``machine(**settings)`` -> Machine; ends it and checks that no process and socket is left."""
    machines = []

    def make(ending="halt", netns=None, **settings):
        run_dir = tmp_path / f"run{len(machines)}"
        run_dir.mkdir()
        machines.append(Machine(run_dir, tiny_settings(run_dir, ending, **settings), netns))
        return machines[-1]

    yield make
    for one in machines:
        pids = one.vm.pids()
        one.end()
        assert not [pid for pid in pids if child.start_time(pid)], "a process is left"
        left = set(os.listdir(one.run_dir)) & {"qmp.sock", "vhost-vsock.sock", "kata.hvsock"}
        assert not left, "sockets are left"
        assert one.undo.entries() == []


@pytest.fixture
def taps():
    """``taps(queues)`` -> (name, fds) of a multi-queue tap that vanishes with the test."""
    opened = []

    def make(queues):
        name = f"kt{os.getpid() % 100000}q{len(opened)}"
        iff_tap, iff_no_pi, iff_vnet_hdr, iff_multi_queue = 0x2, 0x1000, 0x4000, 0x100
        flags = iff_tap | iff_no_pi | iff_vnet_hdr | (iff_multi_queue if queues > 1 else 0)
        fds = []
        for _ in range(queues):
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            opened.append(fd)
            fds.append(fd)
            fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))       # TUNSETIFF
        return name, tuple(fds)

    yield make
    for fd in opened:
        os.close(fd)


def nic(name, fds, number=1):
    return base.Nic(f"nic{number}", name, f"02:00:00:00:00:{number:02x}", fds=fds)


# -- life -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["q35", "microvm"])
def test_a_life(machine, kind):
    one = machine(machine_type=kind)
    assert one.vm.console_tail() == "" and one.vm.vcpu_threads() == {}
    one.boot()
    vmm = one.vm.pids()[0]
    facts = one.vm.describe()
    assert (facts["pid"], facts["start_time"]) == (vmm, child.start_time(vmm))
    assert facts["machine"] == kind and facts["version"][0].isdigit()
    assert facts["agent"] == one.vm.agent_address() and facts["agent"].endswith(":1024")
    assert one.vm.vcpu_threads()[0] in map(int, os.listdir(f"/proc/{vmm}/task"))
    assert [record["phase"] for record in one.timeline.records()] == ["spawn"]
    assert one.vm.console.first_at is not None
    assert one.vm.wait(0) is None
    one.vm.stop(LONG)
    assert one.vm.wait(LONG) == (0, "exited with status 0 after host-qmp-quit")
    assert GREETING in one.vm.console_tail(), "the evidence outlives the VM"
    assert one.vm.pids() == [] and one.vm.vcpu_threads() == {}


def test_pause_and_resume(machine):
    one = machine()
    one.boot()
    one.vm.pause()
    assert one.qmp("query-status")["status"] == "paused"
    one.vm.resume()
    assert one.qmp("query-status")["status"] == "running"


def test_a_flooding_guest_does_not_disturb(machine):
    one = machine("flood")
    one.boot()
    assert one.qmp("query-status")["running"]
    assert len(one.vm.console_tail()) <= 64 * 1024


def test_the_network_namespace(machine):
    holder = subprocess.Popen(["/usr/bin/unshare", "-n", "/bin/cat"], stdin=subprocess.PIPE)
    try:
        netns = f"/proc/{holder.pid}/ns/net"
        end = time.monotonic() + LONG
        while os.readlink(netns) == os.readlink("/proc/self/ns/net"):
            assert time.monotonic() < end
            gevent.sleep(0.01)
        ours = os.readlink("/proc/thread-self/ns/net")
        one = machine(netns=netns)
        one.boot()
        assert os.readlink(f"/proc/{one.vm.pids()[0]}/ns/net") == os.readlink(netns)
        assert os.readlink("/proc/thread-self/ns/net") == ours
    finally:
        holder.stdin.close()
        holder.wait()


def test_the_kernels_vsock_is_used_where_it_exists(machine):
    if not host.vhost_vsock_available().usable:
        pytest.skip("no vhost-vsock here")
    one = machine(vsock_backend="kernel")
    one.boot()
    assert one.vm.agent_address().startswith("vsock://")


# -- death ----------------------------------------------------------------------------------------
def test_the_guest_resets_the_machine(machine):
    one = machine("reset")
    one.boot(says="")
    assert one.vm.wait(LONG) == (0, "exited with status 0 after guest-reset")
    assert GREETING in one.vm.console_tail()
    for verb in (one.vm.pause, lambda: one.vm.resize_vcpus(1), lambda: one.vm.start(1)):
        with pytest.raises(FailedPrecondition, match="has ended"):
            verb()
    assert one.vm.vcpu_threads() == {}


def test_the_death_of_qemu_fails_who_waits_at_once(machine):
    one = machine()
    one.boot()
    waiting = gevent.spawn(one.vm._process.qmp.wait_event, "NEVER", None, 60)
    stuck = gevent.spawn(one.vm._process.qmp.channel.exchange, "stuck", lambda line: Event().wait(), 60)
    gevent.sleep(0)
    os.kill(one.vm.pids()[0], signal.SIGKILL)
    assert one.vm.wait(LONG) == (137, "killed by SIGKILL")
    gevent.joinall([waiting, stuck], timeout=LONG)
    assert isinstance(waiting.exception, ConnectionClosed) and isinstance(stuck.exception, ConnectionClosed)
    assert "QEMU killed by SIGKILL" in str(stuck.exception)


def test_stop_gets_past_a_stuck_exchange(machine):
    one = machine()
    one.boot()
    stuck = gevent.spawn(one.vm._process.qmp.channel.exchange, "stuck", lambda line: Event().wait(), None)
    gevent.sleep(0)
    assert one.vm.queue().holder.op == "stuck"
    begun = time.monotonic()
    one.vm.stop(0.4)
    assert time.monotonic() - begun < 3
    assert one.vm.wait(0).status == 137
    stuck.join(LONG)
    assert isinstance(stuck.exception, ConnectionClosed)


def test_stop_kills_a_qemu_that_hangs(machine):
    one = machine()
    one.boot()
    os.kill(one.vm.pids()[0], signal.SIGSTOP)
    one.vm.stop(0.4)
    assert one.vm.wait(0) == (137, "killed by SIGKILL")


def test_stop_in_every_state_and_any_number_of_times(machine):
    never, prepared, running = machine(), machine(), machine()
    never.vm.stop(1)
    prepared.vm.prepare()
    prepared.vm.stop(1)
    running.boot()
    stops = [gevent.spawn(running.vm.stop, LONG) for _ in range(10)]
    gevent.joinall(stops, timeout=LONG, raise_error=True)
    running.vm.stop(LONG)
    for one in (never, prepared, running):
        with pytest.raises(FailedPrecondition):
            one.vm.start(1)


def test_the_journal_has_the_process_while_it_lives(machine):
    from katashim import undo
    one = machine()
    one.boot()

    def journalled():
        return [args["pid"] for _, kind, args in undo.read(f"{one.run_dir}/journal")[1]
                if kind == "process" and args["name"] == "QEMU"]

    pid = one.vm.pids()[0]
    assert journalled() == [pid]
    os.kill(pid, signal.SIGKILL)
    one.vm.wait(LONG)
    assert journalled() == []


# -- starts that fail -----------------------------------------------------------------------------
def test_qemu_that_exits_at_once_is_quoted(machine):
    one = machine(machine_accelerators="no-such-option=1")
    one.vm.prepare()
    with pytest.raises(HypervisorError) as caught:
        one.vm.start(LONG)
    assert "QEMU ended while it was starting: exited with status 1" in str(caught.value)
    assert "no-such-option" in str(caught.value)
    assert "QEMU's stderr" in caught.value.full_text()
    assert one.vm.wait(0).status == 1


def program(tmp_path, text):
    path = tmp_path / "program"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_program_that_never_answers(machine, tmp_path):
    one = machine(path=program(tmp_path, "#!/bin/sh\necho thinking >&2\nexec sleep 60\n"))
    one.vm.prepare()
    with pytest.raises(DeadlineExceeded, match="QEMU of sandbox sandbox1 to answer 'connecting'") as caught:
        one.vm.start(0.3)
    assert "thinking" in caught.value.full_text()
    assert one.vm.wait(0).status == 137


def test_a_program_that_dies_silently(machine, tmp_path):
    one = machine(path=program(tmp_path, "#!/bin/sh\nkill -SEGV $$\n"))
    one.vm.prepare()
    with pytest.raises(HypervisorError, match="QEMU ended while it was starting: killed by SIGSEGV"):
        one.vm.start(LONG)


def test_a_program_that_cannot_be_executed(machine, tmp_path):
    one = machine(path=program(tmp_path, "neither ELF nor script"))
    one.vm.prepare()
    with pytest.raises(HypervisorError, match="cannot start QEMU .* Exec format error"):
        one.vm.start(LONG)


def test_qemu_that_is_not_installed(machine):
    one = machine(path="/usr/bin/no-such-qemu")
    with pytest.raises(ConfigError, match="no such program; install QEMU"):
        one.vm.prepare()


def test_a_namespace_that_does_not_exist(machine):
    one = machine(netns="/run/netns/no-such-netns")
    one.vm.prepare()
    with pytest.raises(HypervisorError, match="cannot start QEMU"):
        one.vm.start(LONG)


def test_a_socket_that_is_there_already(machine):
    one = machine()
    one.vm.prepare()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as other:
        other.bind(f"{one.run_dir}/qmp.sock")
        with pytest.raises(HypervisorError, match="cannot listen on .*: Address already in use"):
            one.vm.start(LONG)


def test_a_share_whose_daemon_does_not_listen(machine):
    one = machine()
    one.vm.prepare()
    one.vm.add_device(base.ShareFs("kataShared", f"{one.run_dir}/no.sock"))
    with pytest.raises(HypervisorError, match=r"no\.sock.*No such file"):
        one.vm.start(LONG)


def test_verbs_before_their_time(machine):
    one = machine()
    with pytest.raises(FailedPrecondition, match="not prepared"):
        one.vm.start(1)
    with pytest.raises(FailedPrecondition, match="not prepared"):
        one.vm.add_device(base.Disk("d", "/dev/null"))
    one.vm.prepare()
    for verb in (one.vm.pause, lambda: one.vm.resize_memory(1)):
        with pytest.raises(FailedPrecondition, match="does not run yet"):
            verb()


def test_a_microvms_initrd_fills_its_pages(machine, tmp_path):
    """Else it would overwrite the ACPI tables that newer firmware puts at the end of memory."""
    initrd = tmp_path / "odd"
    initrd.write_bytes(b"0123456789" * 1000)
    one = machine(machine_type="microvm", initrd=str(initrd))
    one.boot()
    with open(f"/proc/{one.vm.pids()[0]}/cmdline", "rb") as file:
        argv = file.read().split(b"\0")
    name = argv[argv.index(b"-initrd") + 1].decode().replace("self", str(one.vm.pids()[0]))
    with open(name, "rb") as file:
        assert file.read() == initrd.read_bytes() + bytes(12288 - 10000)
    even = tmp_path / "even"
    even.write_bytes(bytes(8192))
    other = machine(machine_type="microvm", initrd=str(even))
    other.boot()
    with open(f"/proc/{other.vm.pids()[0]}/cmdline", "rb") as file:
        assert os.fsencode(even) in file.read().split(b"\0")


def test_a_stop_while_the_launch_waits(machine, monkeypatch):
    from katashim.drivers import qemu_process
    copied, go = Event(), Event()
    in_thread = qemu_process.green.in_thread

    def slow(*args, **options):
        copied.set()
        go.wait()
        return in_thread(*args, **options)

    monkeypatch.setattr(qemu_process.green, "in_thread", slow)
    one = machine(machine_type="microvm")
    one.vm.prepare()
    starting = gevent.spawn(one.vm.start, LONG)
    assert copied.wait(LONG)
    one.vm.stop(LONG)
    go.set()
    starting.join(LONG)
    assert isinstance(starting.exception, FailedPrecondition)
    assert one.vm.pids() == [] and one.vm.wait(0) is not None


# -- devices at boot ------------------------------------------------------------------------------
def test_devices_at_boot_are_where_the_driver_says(machine, taps, tmp_path):
    image = disk_file(tmp_path, "image")
    initrd = disk_file(tmp_path, "initrd")
    one = machine(initrd="", image=image, boot_initrd=initrd, rootfs_type="erofs")
    first, second, card = one.boot(
        disk(tmp_path, "a", serial="first"), disk(tmp_path, "b", readonly=True), nic(*taps(2)))
    assert (first.agent_type, first.guest_address, second.guest_address) == ("blk", "/dev/vdb", "/dev/vdc")
    paths = one.pci_paths()
    names = ["image-device", "disk0-device", "disk1-device"]
    assert [paths[name] for name in names] == sorted(paths[name] for name in names), "image must be vda"
    assert card.guest_address == paths["nic2-device"]
    blocks = {block["qdev"]: block["inserted"] for block in one.qmp("query-block")}
    assert blocks["/machine/peripheral/image-device/virtio-backend"]["ro"]
    assert not blocks["/machine/peripheral/disk0-device/virtio-backend"]["ro"]
    assert blocks["/machine/peripheral/disk1-device/virtio-backend"]["ro"]


def test_devices_at_boot_of_a_microvm(machine, taps, tmp_path):
    one = machine(machine_type="microvm")
    assert base.BLOCK_HOTPLUG in one.vm.capabilities
    first, card = one.boot(disk(tmp_path, "a"), nic(*taps(1)))
    assert (first.agent_type, first.guest_address, card.guest_address) == ("mmioblk", "/dev/vda", "")
    assert base.BLOCK_DEVICE in one.vm.capabilities and base.BLOCK_HOTPLUG not in one.vm.capabilities
    for verb in (lambda: one.vm.add_device(disk(tmp_path, "b")), lambda: one.vm.remove_device(first),
                 lambda: one.vm.resize_vcpus(2), lambda: one.vm.resize_memory(256)):
        with pytest.raises(Unsupported, match="the qemu driver does not support .* microvm"):
            verb()


def test_microvm_with_pci_and_every_option(machine, taps, tmp_path):
    one = machine(machine_type="microvm", machine_accelerators="pcie=on", block_device_driver="virtio-scsi",
                  enable_iothreads=True, reclaim_guest_freed_memory=True, enable_mem_prealloc=True,
                  seccomp_sandbox="on,obsolete=deny,spawn=deny", cpu_features="pmu=off", num_queues=2,
                  block_device_aio="threads", enable_debug=True)
    first, second, card = one.boot(disk(tmp_path, "a"), disk(tmp_path, "b", driver="virtio-blk"), nic(*taps(1)))
    assert (first.agent_type, first.guest_address) == ("scsi", "0:0")
    assert (second.agent_type, second.guest_address) == ("blk", "/dev/vda")
    assert one.pci_paths()["nic2-device"] == card.guest_address


def test_devices_can_be_withdrawn_before_the_start(machine, taps, tmp_path):
    one = machine()
    one.vm.prepare()
    first, second = (one.vm.add_device(disk(tmp_path, name)) for name in "ab")
    card = one.vm.add_device(nic(*taps(1)))
    with pytest.raises(FailedPrecondition, match="the disks after it would be called by other names"):
        one.vm.remove_device(first)
    one.vm.remove_device(card)
    one.vm.remove_device(second)
    third = one.vm.add_device(disk(tmp_path, "c"))
    assert third.guest_address == second.guest_address
    one.vm.start(LONG)
    assert {name for name in one.pci_paths() if name.startswith(("disk", "nic"))} == {
        "disk0-device", "disk3-device"}


def test_devices_are_gone_with_the_vm(machine, tmp_path):
    one = machine()
    (at_boot,) = one.boot(disk(tmp_path, "a"))
    plugged = one.vm.add_device(disk(tmp_path, "b"))
    removing = gevent.spawn(one.vm.remove_device, plugged)
    gevent.sleep(0.05)
    os.kill(one.vm.pids()[0], signal.SIGKILL)
    removing.get(timeout=LONG)
    one.vm.wait(LONG)
    one.vm.remove_device(at_boot)
    with pytest.raises(FailedPrecondition, match="has ended"):
        one.vm.add_device(disk(tmp_path, "c"))


def test_disks_that_cannot_be_used(machine, tmp_path):
    one = machine()
    one.vm.prepare()
    with pytest.raises(NotFound, match="No such file"):
        one.vm.add_device(base.Disk("d", f"{tmp_path}/none"))
    with pytest.raises(Unsupported, match="disks of the kind virtio-pmem"):
        one.vm.add_device(disk(tmp_path, "e", driver="virtio-pmem"))
    with pytest.raises(Unsupported, match="without block_device_driver = virtio-scsi"):
        one.vm.add_device(disk(tmp_path, "f", driver="virtio-scsi"))
    with pytest.raises(Unsupported, match="VfioDevice"):
        one.vm.add_device(base.VfioDevice("v", "0000:00:01.0"))
    assert one.vm.add_device(disk(tmp_path, "g")).guest_address == "/dev/vda", "they took no name"


# -- plugging -------------------------------------------------------------------------------------
def test_a_disk_is_plugged_where_the_driver_says(machine, tmp_path):
    one = machine()
    one.boot()
    wanted = disk(tmp_path, "a", serial="mine")
    added = one.vm.add_device(wanted)
    assert added == wanted._replace(agent_type="blk", guest_address=one.pci_paths()["disk0-device"])
    assert "/" in added.guest_address
    assert one.vm.add_device(wanted) == added, "adding it again finds it"
    assert one.vm.add_device(added) == added
    with pytest.raises(AlreadyExists, match="another Disk called a"):
        one.vm.add_device(wanted._replace(readonly=True))


def test_a_plug_whose_replies_were_lost_is_recognised(machine, tmp_path):
    """QEMU did it, the answer came too late: trying again must not end in "Duplicate nodes"."""
    one = machine()
    one.boot()
    execute, lost = one.vm._process.qmp.execute, []

    def execute_and_lose(command, **arguments):
        reply = execute(command, **arguments)
        if command in ("blockdev-add", "device_add") and command not in lost:
            lost.append(command)
            raise DeadlineExceeded(f"the reply to {command} is late")
        return reply

    one.vm._process.qmp.execute = execute_and_lose
    wanted = disk(tmp_path, "a")
    for step in ("blockdev-add", "device_add"):
        with pytest.raises(DeadlineExceeded, match=step):
            one.vm.add_device(wanted)
    assert one.vm.add_device(wanted).guest_address == one.pci_paths()["disk0-device"]
    nodes = [entry["node-name"] for entry in one.qmp("query-named-block-nodes")]
    assert nodes.count("disk0") == 1


def test_a_refused_plug_leaves_nothing(machine, tmp_path):
    one = machine()
    one.boot()
    before = one.pci_paths()
    one.vm.plan = one.vm.plan._replace(sector_sizes=(1000, 0))
    with pytest.raises(QmpError, match="logical_block_size"):
        one.vm.add_device(disk(tmp_path, "a"))
    assert one.pci_paths() == before
    assert "disk0" not in [entry["node-name"] for entry in one.qmp("query-named-block-nodes")]
    one.vm.plan = one.vm.plan._replace(sector_sizes=(512, 4096))
    assert one.vm.add_device(disk(tmp_path, "a")).guest_address == one.pci_paths()["disk1-device"]


def test_a_guest_that_does_not_let_go(machine, tmp_path):
    one = machine()
    one.boot()
    added = one.vm.add_device(disk(tmp_path, "a"))
    for _ in range(2):              # QEMU refuses the second request; it is no error of ours
        with pytest.raises(DeadlineExceeded, match=r"the guest has not let go of disk0-device in 0\.05 s"):
            one.vm._hotplug.remove_disk("disk0", "disk0-device", 0.05)
    assert one.pci_paths()["disk0-device"] == added.guest_address
    one.vm.remove_device(base.Disk("never-seen", "/dev/null"))


def test_one_disk_is_not_plugged_and_unplugged_at_once(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(qemu_hotplug.Hotplug.remove_disk, "__defaults__", (0.2,))
    one = machine()
    one.boot()
    added = one.vm.add_device(disk(tmp_path, "a"))
    first = gevent.spawn(one.vm.remove_device, added)
    gevent.sleep(0)
    with pytest.raises(FailedPrecondition, match="a is being plugged or unplugged already"):
        one.vm.remove_device(added)
    first.join(LONG)
    assert isinstance(first.exception, DeadlineExceeded)


def test_scsi_disks(machine, taps, tmp_path):
    one = machine(block_device_driver="virtio-scsi")
    _, first = one.boot(nic(*taps(1)), disk(tmp_path, "a"))
    second = one.vm.add_device(disk(tmp_path, "b", serial="second"))
    assert (first.guest_address, second.guest_address, second.agent_type) == ("0:0", "0:1", "scsi")
    assert {block["qdev"] for block in one.qmp("query-block")} >= {"disk1-device", "disk2-device"}


def test_cards_with_several_queues_are_plugged(machine, taps):
    one = machine()
    one.boot()
    name, fds = taps(2)
    added = one.vm.add_device(nic(name, fds))
    assert added.guest_address == one.pci_paths()["nic0-device"]
    assert one.qmp("qom-get", path="/machine/peripheral/nic0-device", property="mq") is True
    assert one.vm.add_device(nic(name, fds)) == added


def test_a_refused_card_leaves_nothing(machine, taps):
    one = machine()
    one.boot()
    name, fds = taps(1)
    with pytest.raises(QmpError):
        one.vm.add_device(nic(name, fds)._replace(mac="not a MAC"))
    with open("/dev/null") as null, pytest.raises(QmpError):
        one.vm.add_device(nic("null", (null.fileno(),), number=2))
    assert one.vm.add_device(nic(name, fds, number=3)).guest_address == "01/01"


def test_all_slots_of_the_bridge_taken(machine, tmp_path):
    one = machine(default_bridges=0)
    one.boot()
    with pytest.raises(ResourceExhausted, match="default_bridges"):
        one.vm.add_device(disk(tmp_path, "a"))


def test_vcpus_and_memory_grow(machine):
    one = machine(default_maxvcpus=3, default_maxmemory=1024, memory_slots=4)
    one.boot()
    assert one.vm.resize_vcpus(2) == 2
    assert one.vm.resize_vcpus(99) == 3
    assert sorted(one.vm.vcpu_threads()) == [0, 1, 2]
    assert one.vm.resize_vcpus(1) == 3, "QEMU does not survive unplugging under TCG"
    assert one.vm.resize_memory(200) == 256, "rounded up to the guest's block"
    assert one.vm.resize_memory(100) == 256, "it never shrinks"
    one.vm.set_memory_block_mb(64)
    assert one.vm.resize_memory(257) == 320
    assert one.vm.resize_memory(1024) == 1024
    summary = one.qmp("query-memory-size-summary")
    assert (summary["base-memory"] + summary["plugged-memory"]) >> 20 == 1024
    for verb in (lambda: one.vm.resize_memory(1025), lambda: one.vm.resize_vcpus(0)):
        with pytest.raises(Exception, match="maximum|cannot have") as caught:
            verb()
        assert caught.value.code == 3
