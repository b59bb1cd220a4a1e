"""The settings of ``[hypervisor.NAME]``: rows of the key table (see keys.py)."""

from katashim.config.keys import (
    GLOBS,
    REGEXES,
    U64,
    choice,
    flag,
    number,
    path,
    real,
    section,
    tables,
    text,
    words,
)

_DISK_DRIVERS = "virtio-blk-pci virtio-blk-mmio virtio-blk-ccw virtio-scsi virtio-pmem"
_DISK_DRIVER_SYNONYMS = {"virtio-blk": "virtio-blk-pci", "virtio-mmio": "virtio-blk-mmio",
                         "nvdimm": "virtio-pmem", "": "virtio-blk-pci"}
_LOG_LEVELS = "trace debug info warn error critical"
_VFIO_PORTS = "no-port root-port switch-port bridge-port"


def _rates(what, unit_of, drivers):
    """The four settings of one token bucket limiter, for disks or for the network."""
    return [
        number(f"{what}_rate_limiter_{kind}_{word}", 0, meaning.format(unit=unit), high=U64, drivers=drivers)
        for kind, unit in unit_of.items()
        for word, meaning in (("max_rate", "Limit in {unit}, 0 for none."),
                              ("one_time_burst", "An initial credit above the limit, in {unit}."))]


HYPERVISOR = section("hypervisor", {
    "The hypervisor itself": [
        path("path", "The VMM's program.",
             by_driver={"qemu": "/usr/bin/qemu-system-x86_64", "clh": "/usr/bin/cloud-hypervisor",
                        "firecracker": "/usr/bin/firecracker", "openvmm": "/usr/bin/openvmm"},
             drivers="QCFDO", done=True, annotation=True, allowed_by="valid_hypervisor_paths"),
        words("valid_hypervisor_paths", "Globs that the annotation `path` must match; empty refuses all.",
              type=GLOBS, done=True),
        path("ctlpath", "The VMM's control program.", drivers="CD", annotation=True,
             allowed_by="valid_ctlpaths"),
        words("valid_ctlpaths", "Globs that the annotation `ctlpath` must match.", type=GLOBS, done=True),
        path("jailer_path", "Firecracker's jailer; empty runs without it.", drivers="F", annotation=True,
             allowed_by="valid_jailer_paths"),
        words("valid_jailer_paths", "Globs that the annotation `jailer_path` must match.", type=GLOBS,
              done=True),
        choice("accel", "auto", "auto kvm tcg",
               "What runs the guest's instructions. `auto` probes whether KVM can really run Linux here "
               "and falls back to TCG, QEMU's own emulator; `kvm` makes its absence an error.",
               drivers="Q", ours=True, done=True),
        text("machine_type", "The machine: `q35` has PCI hotplug, `microvm` boots faster without it. "
             "For the remote hypervisor, the cloud's instance type.", default="q35", drivers="QR",
             done=True, annotation=True),
        text("machine_accelerators", "More options for `-machine`, separated by commas.", drivers="Q",
             annotation=True, done=True),
        text("cpu_features", "More features for `-cpu`, separated by commas, such as `pmu=off`.",
             drivers="Q", annotation=True, done=True),
        path("firmware", "The firmware image (`-bios`).", drivers="QCD", annotation=True, must_exist=True,
             done=True),
        path("firmware_volume", "The firmware's variable store.", drivers="Q"),
        words("pflashes", "Images for `-pflash`.", drivers="QD"),
        flag("disable_nesting_checks", "Do not adapt the devices when this host is itself a guest.",
             drivers="Q"),
        flag("rootless", "Run the VMM as a user of its own instead of root.", drivers="QCD",
             annotation=True),
        flag("disable_seccomp", "Switch the VMM's own seccomp filter off.", drivers="CFD"),
        text("seccomp_sandbox", "QEMU's `-sandbox`, such as `on,obsolete=deny,spawn=deny`.", drivers="Q",
             done=True),
        flag("disable_selinux", "Start the VMM without an SELinux label."),
        flag("disable_guest_selinux", "Send no SELinux labels to the guest.", default=True, done=True),
        text("selinux_label", "The label of container processes in the guest, `user:role:type`."),
    ],
    "The guest's kernel and image": [
        path("kernel", "The guest's kernel.", done=True, annotation=True, must_exist=True, drivers="QCFDO"),
        path("image", "The guest's root filesystem, attached as a read-only disk.", done=True,
             annotation=True, must_exist=True, drivers="QCFDO"),
        path("initrd", "The guest's root filesystem as an initramfs. Either `image` or `initrd`.",
             done=True, annotation=True, must_exist=True, drivers="QCDO"),
        path("boot_initrd", "A small initramfs that loads the kernel's modules and then switches to "
             "`image`, for a kernel that has its disk driver as a module.", ours=True, done=True,
             must_exist=True, drivers="Q"),
        text("kernel_params", "Words for the guest's kernel command line, separated by spaces; quotes "
             "protect spaces inside a word. A word given again replaces the earlier one of its name.",
             done=True, annotation=True),
        text("kernel_verity_params", "dm-verity of `image`: `root_hash=...,salt=...,data_blocks=...,"
             "data_block_size=...,hash_block_size=...`.", annotation=True, drivers="QCD"),
        choice("rootfs_type", "ext4", "ext4 xfs erofs", "The filesystem in `image`.", done=True),
        choice("vm_rootfs_driver", "virtio-blk-pci", _DISK_DRIVERS,
               "The kind of disk that `image` becomes in the guest.", synonyms=_DISK_DRIVER_SYNONYMS,
               drivers="QCFD"),
        tables("guest_extension_images", "name path verity_params",
               "Further read-only images for the guest.", drivers="QD"),
        path("guest_hook_path", "A directory of OCI hooks in the guest's image.", done=True,
             annotation=True),
        text("initdata", "The confidential guest's initdata, raw TOML. Set by the annotation "
             "`cc_init_data` (base64 of gzip).", annotation="cc_init_data"),
        real("boot_timeout_s", 60.0, "How long the guest may take from the VMM's launch to the agent's "
             "first answer.", low=1, high=3600, ours=True, done=True),
    ],
    "Processors and memory": [
        real("default_vcpus", 1.0, "vCPUs of a VM whose pod sets no CPU limit. 0 means 1; less than 0, "
             "or more than the host has, means all of the host's.", done=True, annotation=True),
        real("overhead_vcpus", 0.0, "vCPUs added to a pod's own CPU limit for the guest and the VMM.",
             low=0, high=256, done=True),
        number("default_maxvcpus", 0, "The most vCPUs a VM may have; 0 means all of the host's.",
               done=True, annotation="default_max_vcpus"),
        number("default_memory", 128, "Memory of a VM whose pod sets no memory limit, in MiB. The host "
               "spends it only as the guest touches it.", low=1, done=True, annotation=True),
        number("overhead_memory", 0, "MiB added to a pod's own memory limit for the guest's kernel and "
               "agent.", done=True),
        number("default_maxmemory", 0, "The most memory a VM may have, in MiB; 0 means all of the host's.",
               done=True),
        number("memory_slots", 128, "How many times memory can be plugged in.", drivers="QR",
               annotation=True, done=True),
        number("memory_offset", 0, "MiB of address space kept for nvdimm devices.", high=U64, drivers="Q",
               annotation=True),
        flag("enable_mem_prealloc", "Take all of the guest's memory from the host at boot.", drivers="QC",
             annotation=True, done=True),
        flag("enable_hugepages", "Back the guest's memory with huge pages.", drivers="QCD",
             annotation=True, done=True),
        choice("hugepage_type", "hugetlbfs", "hugetlbfs thp", "Which huge pages.", drivers="D",
               annotation=True),
        flag("enable_virtio_mem", "Resize the guest's memory by virtio-mem.", drivers="QD",
             annotation=True),
        path("file_mem_backend", "Directory of the file that backs the guest's memory.", drivers="Q",
             annotation=True, allowed_by="valid_file_mem_backends"),
        words("valid_file_mem_backends", "Globs that the annotation `file_mem_backend` must match.",
              type=GLOBS, drivers="Q", done=True),
        flag("reclaim_guest_freed_memory", "Give memory that the guest frees back to the host (a balloon "
             "with free page reporting).", drivers="QCD", done=True),
        flag("disable_nested_virtualization", "Hide the CPU's virtualization from the guest.", drivers="C"),
        flag("enable_numa", "Give the guest NUMA nodes like the host's.", drivers="Q"),
        words("numa_mapping", "Which host nodes back each guest node.", drivers="Q"),
        flag("enable_guest_swap", "Give the guest a swap file.", drivers="DC", annotation=True),
        path("guest_swap_path", "Where swap files are made.", drivers="DC",
             default="/run/kata-containers/swap"),
        number("guest_swap_size_percent", 100, "Size of the swap file in percent of the memory.",
               drivers="DC", high=10000),
        number("guest_swap_create_threshold_secs", 60, "Seconds without change before it is made.",
               drivers="DC"),
    ],
    "Disks": [
        flag("disable_block_device_use", "Share a container's root filesystem as a directory even when "
             "it is on a block device.", done=True, annotation=True),
        choice("block_device_driver", "virtio-blk-pci", _DISK_DRIVERS, "The kind of disk that containers' "
               "volumes and root filesystems become.", synonyms=_DISK_DRIVER_SYNONYMS, annotation=True,
               done=True),
        choice("block_device_aio", "io_uring", "io_uring native threads", "How QEMU does disk I/O.",
               drivers="Q", done=True),
        flag("block_device_cache_set", "Use the two cache settings below.", drivers="QC", annotation=True,
             done=True),
        flag("block_device_cache_direct", "Bypass the host's page cache.", drivers="QC", annotation=True,
             done=True),
        flag("block_device_cache_noflush", "Ignore the guest's flushes.", drivers="QC", annotation=True,
             done=True),
        number("block_device_logical_sector_size", 0, "Logical sector size in bytes; 0 leaves it to the "
               "VMM.", high=65536, drivers="Q", annotation="blk_logical_sector_size", done=True),
        number("block_device_physical_sector_size", 0, "Physical sector size in bytes; 0 leaves it to the "
               "VMM.", high=65536, drivers="Q", annotation="blk_physical_sector_size", done=True),
        number("queue_size", 128, "Entries of a disk's queue, a power of two.", low=2, high=1024,
               annotation="block_device_queue_size", done=True),
        number("num_queues", 1, "Queues of a disk.", low=1, high=1024,
               annotation="block_device_num_queues", done=True),
        flag("disable_image_nvdimm", "Attach `image` as a disk, not as persistent memory.",
             annotation=True, drivers="QC"),
        flag("enable_iothreads", "Do disk I/O in threads of its own.", drivers="Q", annotation=True,
             done=True),
        number("indep_iothreads", 0, "Independent I/O threads for virtio-blk.", drivers="Q",
               annotation=True, done=True),
        *_rates("disk", {"bw": "bits a second", "ops": "operations a second"}, "CFD"),
        flag("enable_vhost_user_store", "Accept vhost-user block devices (SPDK).", drivers="QD",
             annotation=True),
        path("vhost_user_store_path", "Where their sockets are.", default="/var/run/vhost-user",
             drivers="QD", annotation=True, allowed_by="valid_vhost_user_store_paths"),
        words("valid_vhost_user_store_paths", "Globs that the annotation `vhost_user_store_path` must "
              "match.", type=GLOBS, done=True),
        number("vhost_user_reconnect_timeout_sec", 0, "Seconds before a vhost-user socket is dialled "
               "again; 0 means never.", drivers="Q"),
    ],
    "Shared filesystem": [
        choice("shared_fs", "none", "none virtio-fs inline-virtio-fs virtio-fs-nydus virtio-9p",
               "How directories of the host reach the guest. `none` lets only block devices and copies "
               "in.", synonyms={"": "virtio-fs"}, done=True, annotation=True),
        path("virtio_fs_daemon", "The virtiofsd program. Both are supported, the one in Rust and the one "
             "that came with QEMU up to 7.2; empty looks in the usual places.", drivers="QCO", done=True,
             annotation=True, allowed_by="valid_virtio_fs_daemon_paths"),
        words("valid_virtio_fs_daemon_paths", "Globs that the annotation `virtio_fs_daemon` must match.",
              type=GLOBS, done=True),
        words("virtio_fs_extra_args", "More arguments for virtiofsd. An annotation adds to them.",
              done=True, annotation=True),
        choice("virtio_fs_cache", "never", "never metadata auto always",
               "What the guest may cache: nothing, for a second (`auto`), or for good.",
               synonyms={"none": "never", "": "never"}, done=True, annotation=True),
        number("virtio_fs_cache_size", 0, "MiB of the DAX window; 0 for none.", annotation=True),
        flag("virtio_fs_is_dax", "Map files straight from the host's page cache.", annotation=True),
        number("virtio_fs_queue_size", 1024, "Entries of the queue, a power of two.", low=2, high=1024,
               done=True),
        choice("virtio_fs_inode_file_handles", "prefer", "never prefer mandatory",
               "Whether virtiofsd keeps file handles instead of open files."),
        number("msize_9p", 8192, "Bytes of a 9p message.", drivers="Q"),
        path("prefetch_list_path", "A list of files for nydus to fetch ahead.",
             annotation="prefetch_files.list"),
    ],
    "PCI and other devices": [
        number("default_bridges", 1, "PCI bridges for hotplug.", high=5, drivers="QCD",
               by_driver={"clh": 2, "dragonball": 0}, done=True),
        choice("cold_plug_vfio", "no-port", _VFIO_PORTS, "Where VFIO devices are attached at boot.",
               synonyms={"": "no-port"}, drivers="QC"),
        choice("hot_plug_vfio", "no-port", _VFIO_PORTS, "Where VFIO devices are plugged in later.",
               synonyms={"": "no-port"}, drivers="QC"),
        flag("hotplug_vfio_on_root_bus", "Plug VFIO devices into the root bus.", drivers="Q"),
        number("pcie_root_port", 0, "PCIe root ports for devices with large BARs.", drivers="Q",
               annotation=True),
        number("pcie_switch_port", 0, "PCIe switch ports; excludes `pcie_root_port`.", drivers="Q",
               annotation=True),
        flag("enable_iommu", "Give the guest an IOMMU.", drivers="QC", annotation=True),
        flag("enable_iommu_platform", "Put devices behind it (`iommu_platform=on`).", drivers="Q",
             annotation=True),
        path("entropy_source", "The host's source of the guest's entropy.", default="/dev/urandom",
             annotation=True, allowed_by="valid_entropy_sources", done=True),
        words("valid_entropy_sources", "Globs that the annotation `entropy_source` must match.", type=GLOBS,
              done=True),
    ],
    "Network and vsock": [
        flag("disable_vhost_net", "Let the VMM move packets instead of the host's kernel.", drivers="QD",
             annotation=True, done=True),
        number("network_queues", 1, "Queue pairs of a network card.", low=1, high=256,
               annotation=True, done=True),
        number("rx_rate_limiter_max_rate", 0, "Limit of inbound traffic, bits a second; 0 for none.",
               high=U64, annotation=True),
        number("tx_rate_limiter_max_rate", 0, "Limit of outbound traffic, bits a second; 0 for none.",
               high=U64, annotation=True),
        *_rates("net", {"bw": "bits a second", "ops": "operations a second"}, "C"),
        choice("vsock_backend", "auto", "auto kernel vhost-device-vsock builtin",
               "What carries the agent's connection: the kernel's vhost-vsock, the program "
               "vhost-device-vsock, or katashim's own backend. `auto` takes the first that works.",
               drivers="Q", ours=True, done=True),
        path("vsock_backend_path", "The vhost-device-vsock program; empty looks in PATH.", drivers="Q",
             ours=True, done=True),
    ],
    "Confidential guests": [
        flag("confidential_guest", "Encrypt the guest's memory with what the CPU has (TDX, SNP, SEV, SE)."),
        flag("sev_snp_guest", "SEV-SNP rather than SEV on AMD.", drivers="QC"),
        text("snp_id_block", "SNP ID block, base64.", drivers="Q"),
        text("snp_id_auth", "SNP ID authentication, base64.", drivers="Q"),
        number("snp_guest_policy", 0x30000, "SNP guest policy bits.", high=U64, drivers="QC"),
        number("tdx_quote_generation_service_socket_port", 4050, "vsock port of the TDX quote service; "
               "0 for its unix socket.", drivers="Q"),
        text("measurement_algo", "Measurement algorithm of an Arm CCA guest.", drivers="Q"),
    ],
    "Remote hypervisor (peer pods)": [
        path("hypervisor_socket", "Socket of the cloud API adaptor.", default="/run/peerpod/hypervisor.sock",
             drivers="R"),
        number("hypervisor_timeout", 600, "Seconds that starting the instance may take.", high=2 ** 31 - 1,
               drivers="R"),
        number("default_gpus", 0, "GPUs of the instance.", drivers="R", annotation=True),
        text("default_gpu_model", "Model of the GPUs.", drivers="R", annotation=True),
    ],
    "Annotations": [
        words("enable_annotations", "Regular expressions; a pod's annotation "
              "`io.katacontainers.config.hypervisor.NAME` is allowed when one of them matches the whole "
              "NAME.", type=REGEXES, done=True),
    ],
    "Debugging": [
        flag("enable_debug", "More output from the VMM and the guest's kernel.", done=True),
        choice("log_level", "info", _LOG_LEVELS, "Level of the VMM's log.", synonyms={"warning": "warn"}),
        choice("extra_monitor_socket", "", "hmp qmp qmp-pretty", "A second QEMU monitor socket for "
               "people, when `enable_debug` is on.", drivers="Q"),
        path("guest_memory_dump_path", "Where the guest's memory is dumped when its kernel panics.",
             drivers="Q"),
        flag("guest_memory_dump_paging", "Dump with the guest's page tables applied, for gdb.",
             drivers="Q"),
        flag("use_legacy_serial", "A serial port instead of a virtio console.", drivers="QC"),
    ],
    "Template internals": [
        flag("boot_to_be_template", "Boot a VM that becomes a template."),
        flag("boot_from_template", "Boot from a template."),
        path("memory_path", "The template's memory file."),
        path("device_state_path", "The template's device state file."),
    ],
})

FACTORY = section("hypervisor.factory", {
    "VM templates": [
        flag("enable_template", "Start VMs as copies of a template."),
        path("template_path", "Where the template lives.", default="/run/vc/vm/template"),
        number("vm_cache_number", 0, "VMs kept ready by the VM cache; 0 for none."),
        path("vm_cache_endpoint", "The VM cache's socket.", default="/var/run/kata-containers/cache.sock"),
    ],
})
