"""Rules that join settings: contradictions, what a driver refuses, what is not implemented yet.

Kata's rules (its hypervisor plugins' and agent's checks), told with the place of the setting that
breaks them. Types and ranges of single settings are values.py's.
"""

import os
import re

from katashim.config.kernel_params import split_params
from katashim.config.records import ROW_TYPES
from katashim.config.table import SECTIONS, keys
from katashim.errors import InvalidArgument

# Settings that a driver refuses, as Kata's drivers do: {driver: {setting: why}}. A tuple: these values.
_REFUSED = {
    "qemu": {
        "jailer_path": "QEMU has no jailer",
        "enable_guest_swap": "guest swap works with Cloud Hypervisor and Dragonball only",
        "vm_rootfs_driver": ("virtio-blk-mmio",), "block_device_driver": ("virtio-blk-mmio",),
    },
    "clh": {"jailer_path": "Cloud Hypervisor has no jailer"},
    "firecracker": {
        "initrd": "Firecracker boots from an image", "ctlpath": "Firecracker has none",
        "shared_fs": "Firecracker has no shared filesystem",
    },
    "dragonball": {
        "path": "Dragonball is no program of its own", "ctlpath": "Dragonball has none",
        "firmware": "Dragonball boots without firmware", "enable_iothreads": "Dragonball has none",
        "enable_iommu": "Dragonball has none", "enable_iommu_platform": "Dragonball has none",
        "default_bridges": "Dragonball has none", "pcie_root_port": "Dragonball has none",
        "pcie_switch_port": "Dragonball has none", "machine_type": "Dragonball has one machine",
        "pflashes": "Dragonball boots without firmware", "rootless": "Dragonball runs in the shim",
        "block_device_driver": ("virtio-scsi",), "shared_fs": ("virtio-fs-nydus",),
    },
    "remote": {"initrd": "the image is the cloud's", "image": "the image is the cloud's"},
}
_QEMU_MACHINES = ("q35", "microvm", "pc", "virt", "pseries", "s390-ccw-virtio")
_MIN_MEMORY_MB = {"firecracker": 128}
_VERITY_FIELDS = ("root_hash", "salt", "data_blocks", "data_block_size", "hash_block_size")
_OUR_GUEST = "/var/lib/katashim/guest/"
_SHARED_PATH = re.compile(r"(/[-\w.]+)+/?")


def check(settings, driver):
    """Judge settings together.

    :param settings: {full name: Provenance} of every key.
    :param driver: "qemu", ...
    :returns: (problems, warnings), lists of sentences.
    """
    judge = _Judge(settings, driver)
    for rule in _RULES:
        rule(judge)
    return judge.problems, _warnings(settings, driver)


def missing_files(config):
    """Sentences about files that the configuration names and this host does not have.

    The drivers and the share-fs check what they are about to use; this is for people who want to know
    before a pod fails.
    """
    names = [f"hypervisor.{name}" for name in
             ("path", "kernel", "image", "initrd", "boot_initrd", "firmware", "virtio_fs_daemon",
              "jailer_path", "vsock_backend_path")]
    problems = []
    for name in names:
        value = config.sources[name].value
        if value and not os.path.exists(value):
            cure = "; `katashim-ctl guest build` makes it" if value.startswith(_OUR_GUEST) else ""
            problems.append(f"{config.source(name).where}: {name} names {value}, which does not exist{cure}")
    for entry in config.runtime.sandbox_bind_mounts:
        if not os.path.exists(_bind_source(entry)):
            problems.append(f"{config.source('runtime.sandbox_bind_mounts').where}: sandbox_bind_mounts "
                            f"names {_bind_source(entry)}, which does not exist")
    return problems


class _Judge:
    """The settings under judgement, and what was found wrong."""

    def __init__(self, settings, driver):
        self.settings, self.driver, self.problems = settings, driver, []

    def value(self, name):
        return self.settings[name].value

    def is_set(self, name):
        return self.settings[name].where != "default"

    def wrong(self, name, text):
        """Note a problem at the place where `name` was set."""
        self.problems.append(f"{self.settings[name].where}: {text}")


# -- the rules ------------------------------------------------------------------------------------
def _guest(judge):
    image, initrd = judge.value("hypervisor.image"), judge.value("hypervisor.initrd")
    if judge.driver == "remote":
        return
    if not judge.value("hypervisor.kernel"):
        judge.wrong("hypervisor.kernel", f"[hypervisor.{judge.driver}] needs a kernel")
    if image and initrd:
        judge.wrong("hypervisor.initrd", f"image and initrd are both set (image at "
                                         f"{judge.settings['hypervisor.image'].where}); a guest has one root")
    secure_execution = (judge.value("hypervisor.confidential_guest")
                        and judge.value("hypervisor.machine_type") == "s390-ccw-virtio")
    if not image and not initrd and not secure_execution:
        judge.wrong("hypervisor.image", f"[hypervisor.{judge.driver}] needs an image or an initrd")
    if judge.value("hypervisor.boot_initrd") and not image:
        judge.wrong("hypervisor.boot_initrd", "boot_initrd switches to an image, and image is not set")


def _refusals(judge):
    for name, refused in _REFUSED.get(judge.driver, {}).items():
        full = f"hypervisor.{name}"
        value, key = judge.value(full), SECTIONS["hypervisor"][name]
        if isinstance(refused, tuple):
            if value in refused:
                judge.wrong(full, f"the {judge.driver} driver cannot have {name} = {value}")
        elif judge.is_set(full) and value != key.default_for(judge.driver):
            judge.wrong(full, f"the {judge.driver} driver refuses {name}: {refused}")


def _machine(judge):
    machine = judge.value("hypervisor.machine_type")
    if judge.driver == "qemu" and machine not in _QEMU_MACHINES:
        judge.wrong("hypervisor.machine_type",
                    f'machine_type is "{machine}", must be one of {", ".join(_QEMU_MACHINES)}')
    if judge.value("hypervisor.pcie_root_port") and judge.value("hypervisor.pcie_switch_port"):
        judge.wrong("hypervisor.pcie_switch_port", "pcie_root_port and pcie_switch_port exclude each other")


def _size(judge):
    vcpus, most = judge.value("hypervisor.default_vcpus"), judge.value("hypervisor.default_maxvcpus")
    if vcpus > most:
        judge.wrong("hypervisor.default_vcpus",
                    f"default_vcpus is {vcpus:g}, more than default_maxvcpus, {most} "
                    f"({judge.settings['hypervisor.default_maxvcpus'].where})")
    memory, most = judge.value("hypervisor.default_memory"), judge.value("hypervisor.default_maxmemory")
    least = _MIN_MEMORY_MB.get(judge.driver, 64)
    if memory < least:
        judge.wrong("hypervisor.default_memory",
                    f"default_memory is {memory} MiB, the {judge.driver} driver needs {least} or more")
    if memory > most:
        judge.wrong("hypervisor.default_memory",
                    f"default_memory is {memory} MiB, more than default_maxmemory, {most} "
                    f"({judge.settings['hypervisor.default_maxmemory'].where})")
    if os.uname().machine == "ppc64le" and (memory < 1024 or memory % 256):
        judge.wrong("hypervisor.default_memory",
                    f"default_memory is {memory} MiB; on ppc64le it must be 1024 or more, in steps of 256")


def _queues_and_sectors(judge):
    for name in ("hypervisor.virtio_fs_queue_size", "hypervisor.queue_size"):
        if not _power_of_two(judge.value(name)):
            judge.wrong(name, f"{name} is {judge.value(name)}, must be a power of two")
    logical, physical = "block_device_logical_sector_size", "block_device_physical_sector_size"
    for name in (logical, physical):
        value = judge.value(f"hypervisor.{name}")
        if value and (value < 512 or not _power_of_two(value)):
            judge.wrong(f"hypervisor.{name}",
                        f"{name} is {value}, must be 0 or a power of two from 512 to 65536")
    small, large = judge.value(f"hypervisor.{logical}"), judge.value(f"hypervisor.{physical}")
    if small and large and small > large:
        judge.wrong(f"hypervisor.{logical}", f"{logical} {small} is more than {physical} {large}")


def _ways_into_the_guest(judge):
    shared = judge.value("hypervisor.shared_fs")
    if judge.value("hypervisor.confidential_guest") and shared != "none":
        judge.wrong("hypervisor.shared_fs", f'shared_fs is "{shared}", and a confidential guest shares no '
                                            'memory with the host: it needs "none"')
    if shared == "none" and judge.value("hypervisor.disable_block_device_use"):
        judge.wrong("hypervisor.disable_block_device_use",
                    'nothing can carry a root filesystem: shared_fs is "none" and block devices are disabled')
    if judge.value("runtime.disable_new_netns") and judge.value("runtime.internetworking_model") != "none":
        judge.wrong("runtime.disable_new_netns",
                    'disable_new_netns works with internetworking_model = "none" only')


def _agent_times(judge):
    dial, reconnect = judge.value("agent.dial_timeout_ms"), judge.value("agent.reconnect_timeout_ms")
    if reconnect < dial:
        judge.wrong("agent.reconnect_timeout_ms",
                    f"reconnect_timeout_ms is {reconnect}, less than dial_timeout_ms, {dial}")


def _kernel_words(judge):
    try:
        split_params(judge.value("hypervisor.kernel_params"))
    except InvalidArgument as exc:
        judge.wrong("hypervisor.kernel_params", str(exc))
    verity = judge.value("hypervisor.kernel_verity_params")
    if verity:
        _verity(judge, "hypervisor.kernel_verity_params", verity)


def _verity(judge, name, text):
    fields = [part.partition("=") for part in text.split(",")]
    names = [field[0] for field in fields]
    for field in (field for field in names if field not in _VERITY_FIELDS):
        judge.wrong(name, f'{name} has the unknown field "{field}"')
    for field in (field for field in _VERITY_FIELDS if names.count(field) != 1):
        judge.wrong(name, f"{name} needs the field {field} once")
    for field, _, value in fields:
        if field in _VERITY_FIELDS[2:] and not (value.isdigit() and int(value)):
            judge.wrong(name, f"{name}: {field} must be a number above 0")


def _extensions(judge):
    full, seen = "hypervisor.guest_extension_images", set()
    for row in judge.value(full):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", row.name):
            judge.wrong(full, f'a guest_extension_images name is "{row.name}", must be letters, digits, '
                              "- and _")
        if row.name in seen:
            judge.wrong(full, f"guest_extension_images has {row.name} twice")
        if not row.path.startswith("/"):
            judge.wrong(full, f"guest_extension_images {row.name} needs an absolute path")
        seen.add(row.name)


def _mounts(judge):
    full, seen = "runtime.sandbox_bind_mounts", set()
    for entry in judge.value(full):
        source = _bind_source(entry)
        if not source.startswith("/"):
            judge.wrong(full, f"sandbox_bind_mounts has {entry}, must be an absolute path")
        name = os.path.basename(source.rstrip("/"))
        if name in seen:
            judge.wrong(full, f"sandbox_bind_mounts has two entries that end in {name}")
        seen.add(name)
    full = "runtime.shared_mounts"
    for row in judge.value(full):
        empty = [field for field in ROW_TYPES[full]._fields if not getattr(row, field)]
        if empty:
            judge.wrong(full, f"shared_mounts {row.name or '?'} needs {empty[0]}")
        for path in filter(None, (row.src_path, row.dst_path)):
            if not _SHARED_PATH.fullmatch(path) or ".." in path.split("/"):
                judge.wrong(full, f"shared_mounts {row.name}: {path} must be an absolute path of letters, "
                                  "digits, -, _ and ., without ..")


_RULES = (_guest, _refusals, _machine, _size, _queues_and_sectors, _ways_into_the_guest, _agent_times,
          _kernel_words, _extensions, _mounts)


def _power_of_two(number):
    return number > 0 and number & (number - 1) == 0


def _bind_source(entry):
    return entry[:-3] if entry.endswith((":ro", ":rw")) else entry


# -- what has no effect ---------------------------------------------------------------------------
def _warnings(settings, driver):
    """One sentence for settings that nothing acts on yet, one for those this driver has no use for."""
    not_done, not_used = [], []
    for key in keys():
        setting = settings[key.full_name]
        if setting.where == "default" or setting.value == key.default_for(driver):
            continue
        if key.section == "hypervisor" and not key.used_by(driver):
            not_used.append(f"{key.name} ({setting.where})")
        elif not key.done:
            not_done.append(f"{key.name} ({setting.where})")
    warnings = []
    if not_done:
        warnings.append("katashim does not implement these settings yet, they have no effect: "
                        + ", ".join(not_done))
    if not_used:
        warnings.append(f"the {driver} driver has no use for these settings: " + ", ".join(not_used))
    return warnings
