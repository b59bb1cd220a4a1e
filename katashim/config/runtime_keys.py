"""The settings of ``[runtime]``: rows of the key table (see keys.py)."""

from katashim.config.keys import choice, flag, number, path, section, tables, text, words

RUNTIME = section("runtime", {
    "Which parts": [
        choice("name", "virt_container", "virt_container",
               "The kind of sandbox: a virtual machine.",
               synonyms={"": "virt_container", "virt-container": "virt_container"}, done=True,
               annotation=True),
        text("hypervisor_name", "Which [hypervisor.NAME] is used. Without it, the only one there is.",
             done=True, annotation=True),
        text("agent_name", "Which [agent.NAME] is used. Without it, the only one there is.", done=True,
             annotation=True),
        words("experimental", "Names of experimental features to switch on.", annotation=True),
    ],
    "Network": [
        choice("internetworking_model", "tcfilter", "tcfilter macvtap none l3forwarding",
               "How the pod's network interface is joined to the guest's: by tc redirects, or not at all "
               "(`none`).", synonyms={"": "tcfilter"}, done=True, annotation=True),
        flag("disable_new_netns", "Run the VMM in the host's network namespace; needs the model `none`.",
             annotation=True, done=True),
        path("dan_conf", "Directory of directly attachable networks.",
             default="/run/kata-containers/dans"),
    ],
    "Resources": [
        flag("sandbox_cgroup_only", "One cgroup for all of a pod's processes on the host.", done=True,
             annotation=True),
        flag("static_sandbox_resource_mgmt", "Size the VM once, at boot, from the pod's limits.",
             done=True),
        number("static_sandbox_default_workload_mem", 0, "MiB to assume for a pod without a limit."),
        number("static_sandbox_default_workload_vcpus", 0, "vCPUs to assume for a pod without a limit."),
        flag("enable_vcpus_pinning", "Pin each vCPU to a host CPU when their numbers agree.",
             annotation=True),
    ],
    "Containers": [
        flag("disable_guest_seccomp", "Do not apply seccomp profiles in the guest.", done=True,
             annotation=True),
        words("sandbox_bind_mounts", "Host paths for the guest's own services, `PATH[:ro|:rw]`, read-only "
              "without a suffix."),
        choice("emptydir_mode", "shared-fs", "shared-fs block-encrypted block-plain",
               "How Kubernetes emptyDir volumes reach the guest.", synonyms={"": "shared-fs"}),
        flag("disable_guest_empty_dir", "Keep emptyDir volumes on the host."),
        choice("vfio_mode", "guest-kernel", "guest-kernel vfio",
               "Who drives a VFIO device: the guest's kernel, or the container.",
               synonyms={"": "guest-kernel"}, annotation=True, done=True),
        tables("shared_mounts", "name src_ctr src_path dst_ctr dst_path",
               "Mounts of one container that another sees.", annotation=True),
        flag("use_passfd_io", "Hand stdio to the guest by fd passing."),
        number("passfd_listener_port", 1027, "vsock port for it.", low=1),
        path("pod_resource_api_sock", "The kubelet's pod resources socket, to find devices."),
        path("kubelet_root_dir", "The kubelet's directory.", default="/var/lib/kubelet"),
    ],
    "Debugging": [
        flag("enable_debug", "Log at debug level.", done=True),
        choice("log_level", "info", "trace debug info warn error critical", "Level of the shim's log.",
               synonyms={"warning": "warn"}),
        flag("keep_abnormal", "Keep a failed sandbox for inspection."),
        flag("enable_pprof", "Go's profiler; nothing here.", annotation=True),
        flag("enable_tracing", "Make spans for Jaeger."),
        text("jaeger_endpoint", "Jaeger's collector, a URL."),
        text("jaeger_user", "User at the collector."),
        text("jaeger_password", "Password at the collector."),
    ],
})
