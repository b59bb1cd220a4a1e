"""Helpers of the QEMU driver's tests: settings that work here, a VM with its undo stack, evidence."""

import time

import gevent
import tiny_kernel

from katashim import timeline, undo
from katashim.config.records import Hypervisor
from katashim.drivers import base
from katashim.drivers.qemu import Qemu
from katashim.resources.releases import RELEASES

LONG = 10
GREETING = "hello from the tiny kernel"


class Machine:
    """A Qemu driver in a run directory of its own, with all that a test wants to look at."""

    def __init__(self, run_dir, settings, netns=None):
        self.run_dir = str(run_dir)
        self.undo = undo.Undo(f"{run_dir}/journal", RELEASES)
        self.timeline = timeline.Timeline()
        self.vm = Qemu("sandbox1", self.run_dir, settings, self.undo, netns=netns, timeline=self.timeline)

    def boot(self, *devices, says=GREETING):
        """Prepare, add devices, start, and wait for the guest's words; returns the enriched devices."""
        self.vm.prepare()
        added = [self.vm.add_device(device) for device in devices]
        self.vm.start(LONG)
        if says:
            self.wait_for(says)
        return added

    def wait_for(self, text, timeout_s=LONG):
        """Wait until the guest has printed `text`."""
        end = time.monotonic() + timeout_s
        while text not in self.vm.console_tail():
            if time.monotonic() > end or self.vm.wait(0):
                raise AssertionError(f"the guest did not say {text!r}, but: {self.vm.console_tail()}")
            gevent.sleep(0.01)

    def qmp(self, command, **arguments):
        return self.vm._process.qmp.execute(command, **arguments)

    def pci_paths(self):
        """``{qdev id: guest address}`` of every device, as QEMU itself tells."""
        found = {}

        def walk(devices, prefix):
            for device in devices:
                path = f"{prefix}{device['slot']:02x}"
                found[device["qdev_id"]] = path
                walk(device.get("pci_bridge", {}).get("devices", []), path + "/")

        for bus in self.qmp("query-pci"):
            walk(bus["devices"], "")
        return found

    def end(self):
        try:
            self.vm.stop(LONG)
        finally:
            failed = self.undo.unwind()
            self.undo.close()
        assert failed == []


def tiny_settings(directory, ending="halt", **changes):
    """A hypervisor record whose guest is the tiny kernel."""
    kernel, initrd = f"{directory}/kernel", f"{directory}/initrd"
    with open(kernel, "wb") as file:
        file.write(tiny_kernel.build(f"{GREETING}\n", ending))
    with open(initrd, "wb") as file:
        file.write(b"no initrd")
    return Hypervisor(**{
        "path": "/usr/bin/qemu-system-x86_64", "kernel": kernel, "initrd": initrd, "accel": "tcg",
        "default_memory": 128, "default_maxmemory": 128, "default_vcpus": 1.0, "default_maxvcpus": 1,
        **changes})


def disk_file(directory, name, megabytes=1):
    path = f"{directory}/{name}"
    with open(path, "wb") as file:
        file.truncate(megabytes << 20)
    return path


def disk(directory, name, **more):
    return base.Disk(name, disk_file(directory, f"{name},x.img"), **more)
