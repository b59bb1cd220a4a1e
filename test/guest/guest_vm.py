"""The reference guest in a real VM, for the tests of what only a guest has: devices, memory, power."""

import os
import subprocess
import time

import gevent
from agent_pods import Pod, make_root
from plain_client import PlainClient
from qemu_vm import Machine, tiny_settings

from katashim.agent import dial
from katashim.drivers import base

GUEST = os.environ.get("KATASHIM_GUEST", "/var/lib/katashim/guest")
BOOT_S = 60
ROOT = "/run/kata-containers/sandbox/root"
PARAMS = "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all"


class GuestVm:
    """A VM whose agent answers, or is not expected to.

    :ivar pod: a agent_pods.Pod in it, whose root is a disk; see :meth:`set_up`.
    """

    def __init__(self, directory, words=PARAMS, root_disk=None, answers=True, **settings):
        run_dir = directory / "run"
        run_dir.mkdir()
        memory = settings.setdefault("default_memory", 512)
        settings = {"kernel": f"{GUEST}/vmlinux", "initrd": "", "image": f"{GUEST}/rootfs.img",
                    "boot_initrd": f"{GUEST}/initrd.img", "rootfs_type": "erofs", "default_maxmemory": memory,
                    "kernel_params": words, **settings}
        self.machine = Machine(run_dir, tiny_settings(run_dir, **settings))
        self.pod = None
        try:
            self.devices = self.machine.boot(*([root_disk] if root_disk else []), says="")
            if answers:
                self._wait_for_agent()
        except BaseException:
            self.end()
            raise

    def client(self, port=1024, service="grpc.AgentService"):
        """A PlainClient for a vsock port of the guest."""
        address = dial.parse(self.machine.vm.agent_address())
        assert address.scheme == "hvsock", f"these tests reach the guest by a hybrid vsock, not {address}"
        return PlainClient(address.place, port, service)

    def set_up(self, **fields):
        """Set up the sandbox, its first disk being the root of the containers to come."""
        client = self.client()
        client.call("CreateSandbox", hostname="pod", sandbox_id="the-pod", **fields)
        self.pod = Pod(client, ROOT, [self.storage(self.devices[0], ROOT)])

    @staticmethod
    def storage(disk, mount_point, options=()):
        """The storage of a disk with ext4 on it."""
        return {"driver": disk.agent_type, "source": disk.guest_address, "fstype": "ext4", "options": options,
                "mount_point": mount_point}

    def console(self):
        """What the guest printed."""
        return self.machine.vm.console_tail()

    def wait_for_console(self, text):
        """Wait until the guest has printed `text`; it may end after that."""
        limit = time.monotonic() + BOOT_S
        while text not in self.console():
            assert time.monotonic() < limit, f"{text!r} was not printed in {BOOT_S} s\n{self.console()}"
            gevent.sleep(0.02)

    def end(self):
        """End it, whatever its state."""
        self.machine.end()

    def _wait_for_agent(self):
        limit = time.monotonic() + BOOT_S
        health = self.client(service="grpc.Health")
        while True:
            try:
                return health.call("Check", timeout_s=5)
            except OSError:
                assert self.machine.vm.wait(0) is None, f"the VM ended\n{self.console()}"
                assert time.monotonic() < limit, f"no answer for {BOOT_S} s\n{self.console()}"
                gevent.sleep(0.02)


def ext4_disk(directory, name, tree=None, megabytes=32):
    """A base.Disk with ext4 on it, filled from the directory `tree`."""
    path = str(directory / f"{name}.ext4")
    with open(path, "wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run(["mkfs.ext4", "-q", *(["-d", tree] if tree else []), path], check=True)
    return base.Disk(name, path)


def busybox_disk(directory):
    """A disk with a busybox root on it."""
    return ext4_disk(directory, "root", make_root(str(directory / "root")))
