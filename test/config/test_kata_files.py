"""Configuration files as Kata ships them (the files beside this in kata/) are understood as they are."""

import glob
import os
import tomllib

import pytest

from katashim.config import Host, load
from katashim.config import keys as kinds
from katashim.config.table import SECTIONS

FILES = {os.path.basename(path)[:-5]: path
         for path in sorted(glob.glob(f"{os.path.dirname(__file__)}/kata/*.toml"))}
HOST = Host(cpus=8, memory_mb=65536)


def loaded(flavour, **more):
    return load(FILES[flavour], env={}, host=HOST, **more)


@pytest.mark.parametrize(("flavour", "driver"), [
    ("dragonball", "dragonball"), ("qemu", "qemu"), ("clh", "clh"), ("rs-fc", "firecracker"),
    ("remote", "remote"), ("qemu-tdx", "qemu"), ("qemu-snp", "qemu"),
    ("qemu-se", "qemu"), ("qemu-coco-dev", "qemu"),
    ("go-qemu", "qemu"), ("go-clh", "clh")])
def test_every_flavour_loads(flavour, driver):
    config = loaded(flavour)
    assert (config.hypervisor.name, config.agent.name) == (driver, "kata")
    assert (config.hypervisor.default_memory, config.hypervisor.default_vcpus) == (2048, 1.0)
    assert config.runtime.disable_guest_seccomp and config.runtime.vfio_mode in ("guest-kernel", "vfio")


@pytest.mark.parametrize("flavour", FILES)
def test_every_value_arrives_with_its_line(flavour):
    """Each setting of the file is in the record, and its line is where the file has it."""
    config = loaded(flavour)
    with open(FILES[flavour], encoding="utf-8") as file:
        text = file.read()
    tree, lines = tomllib.loads(text), text.splitlines()
    tables = {"hypervisor": next(iter(tree["hypervisor"].values())), "agent": tree["agent"]["kata"],
              "runtime": tree["runtime"]}
    checked = 0
    for section, values in tables.items():
        for name, value in values.items():
            if name not in SECTIONS[section] or SECTIONS[section][name].type == kinds.TABLES:
                continue
            source = config.sources[f"{section}.{name}"]
            while source.where.startswith(("the host", "the agent")):       # fitted to the host, or prefixed
                source = source.below
            key = SECTIONS[section][name]
            assert source.value == (tuple(value) if isinstance(value, list)
                                    else key.synonyms.get(value, value))
            path, _, line = source.where.partition(":")
            assert path == config.path and lines[int(line) - 1].startswith(name)
            checked += 1
    assert checked > 40


def test_what_the_qemu_file_asks_for_in_vain_is_named():
    warning, = loaded("qemu").warnings
    assert "katashim does not implement these settings yet" in warning
    assert f"vm_rootfs_driver ({FILES['qemu']}:" in warning
    assert "enable_hugepages" not in warning, "it is set to its default: nothing is asked for"


def test_the_firecracker_file_passes_although_its_dial_exceeds_the_reconnect_default():
    config = loaded("rs-fc")
    assert (config.agent.dial_timeout_ms, config.agent.reconnect_timeout_ms) == (45000, 45000)
    assert config.hypervisor.default_maxmemory == 2048 and config.hypervisor.shared_fs == "none"


def test_the_remote_files_old_keys_count():
    config = loaded("remote")
    assert config.hypervisor.hypervisor_socket == "/run/peerpod/hypervisor.sock"
    assert config.source("hypervisor.hypervisor_timeout").where.endswith("(as remote_hypervisor_timeout)")
    assert config.runtime.internetworking_model == "none"
    assert loaded("remote", annotations={"io.katacontainers.config.hypervisor.machine_type": "t3.large"}
                  ).hypervisor.machine_type == "t3.large"


def test_confidential_files():
    tdx, snp, se = loaded("qemu-tdx").hypervisor, loaded("qemu-snp").hypervisor, loaded("qemu-se").hypervisor
    assert tdx.confidential_guest and tdx.tdx_quote_generation_service_socket_port == 0
    assert tdx.guest_extension_images[0].name == "coco" and "root_hash=ab12" in tdx.kernel_verity_params
    assert snp.sev_snp_guest and snp.snp_guest_policy == 0x30000
    assert se.image == "" and se.initrd == "" and se.machine_type == "s390-ccw-virtio"
    assert "agent.launch_process_timeout=6" in tdx.kernel_params.split()
    assert loaded("qemu-coco-dev").runtime.emptydir_mode == "block-encrypted"


def test_the_dragonball_file():
    config = loaded("dragonball")
    assert config.hypervisor.shared_fs == "inline-virtio-fs" and config.hypervisor.default_bridges == 0
    assert config.runtime.use_passfd_io and config.agent.container_pipe_size == 2097152
    assert config.hypervisor.kernel_params.startswith("agent.container_pipe_size=2097152 console=ttyS1")
    assert config.agent.mem_agent.compact_force_times == 2 ** 64 - 1


def test_the_go_files():
    qemu, clh = loaded("go-qemu"), loaded("go-clh")
    assert qemu.agent.reconnect_timeout_ms == 45000 and qemu.agent.create_container_timeout == 60
    assert clh.hypervisor.log_level == "info" and clh.hypervisor.block_device_driver == "virtio-blk-pci"


@pytest.mark.parametrize("flavour", FILES)
def test_a_drop_in_of_ours_over_a_file_of_katas(flavour, tmp_path):
    base = tmp_path / "configuration.toml"
    with open(FILES[flavour], encoding="utf-8") as file:
        base.write_text(file.read())
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d" / "10-ours.conf").write_text("[runtime]\nenable_debug = true\n")
    config = load(str(base), env={}, host=HOST)
    assert config.runtime.enable_debug and config.runtime.disable_guest_seccomp
