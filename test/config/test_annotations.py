import base64
import gzip

import pytest

from katashim.config import InvalidConfig
from katashim.config.annotations import _glob

PREFIX = "io.katacontainers.config."
ALL = 'enable_annotations = [".*"]'


def asked(**named):
    """Annotations from hypervisor__default_memory="1"."""
    return {PREFIX + name.replace("__", ".", 1): value for name, value in named.items()}


def problem_of(disk, hypervisor, **named):
    with pytest.raises(InvalidConfig) as caught:
        disk.toml(hypervisor, annotations=asked(**named))
    problem, = caught.value.problems
    return problem


# -- what may be asked ----------------------------------------------------------------------------
def test_enabled(disk):
    config = disk.toml('enable_annotations = ["default_.*"]\ndefault_vcpus = 4',
                       annotations=asked(hypervisor__default_vcpus="2"))
    assert config.hypervisor.default_vcpus == 2.0
    source = config.source("hypervisor.default_vcpus")
    assert source.where == f"annotation {PREFIX}hypervisor.default_vcpus"
    assert (source.below.value, source.below.where) == (4.0, f"{config.path}:5")


def test_not_enabled_names_the_annotation_and_the_setting(disk):
    problem = problem_of(disk, 'enable_annotations = ["kernel"]', hypervisor__default_vcpus="2")
    assert problem == (
        f'annotation {PREFIX}hypervisor.default_vcpus is not enabled: add "default_vcpus" to '
        f"enable_annotations of [hypervisor.qemu] ({disk.directory}/kata.toml:4)")
    assert "add \"default_vcpus\" to enable_annotations of [hypervisor.qemu]" in problem_of(
        disk, "", hypervisor__default_vcpus="2")


def test_the_expressions_are_anchored(disk):
    """In Kata "path" enables jailer_path and every other name that contains it."""
    patterns = 'enable_annotations = ["path"]\nvalid_jailer_paths = ["/*"]'
    assert "jailer_path is not enabled" in problem_of(disk, patterns, hypervisor__jailer_path="/j")


def test_others_need_no_enabling(disk):
    config = disk.toml(annotations=asked(
        agent__enable_tracing="true", agent__kernel_modules="i915 a=1,2; e1000e",
        agent__container_pipe_size="4096", agent__cdh_api_timeout_ms="1000",
        agent__policy=base64.b64encode(b"package agent_policy").decode(),
        runtime__create_container_timeout="120", runtime__disable_guest_seccomp="true",
        runtime__experimental="a, b", runtime__internetworking_model="none",
        runtime__sandbox_cgroup_only="true", runtime__enable_vcpus_pinning="true",
        runtime__disable_new_netns="true", runtime__vfio_mode="vfio",
        runtime__name="virt-container", runtime__enable_pprof="false"))
    assert config.agent.enable_tracing and config.agent.kernel_modules == ("i915 a=1,2", "e1000e")
    assert (config.agent.container_pipe_size, config.agent.cdh_api_timeout_ms) == (4096, 1000)
    assert config.agent.policy == "package agent_policy" and config.agent.create_container_timeout == 120
    runtime = config.runtime
    assert runtime.disable_guest_seccomp and runtime.sandbox_cgroup_only and runtime.disable_new_netns
    assert runtime.experimental == ("a", "b") and runtime.internetworking_model == "none"
    assert runtime.vfio_mode == "vfio" and runtime.enable_vcpus_pinning and runtime.name == "virt_container"


@pytest.mark.parametrize(("name", "why"), [
    ("hypervisor__default_memroy", "is unknown; did you mean default_memory?"),
    ("agent__zzz", "is unknown"),
    ("runtime__sandbox_bind_mounts", "is refused: sandbox_bind_mounts is set in the configuration file only"),
    ("hypervisor__vsock_backend_path", "is refused: vsock_backend_path is set in the configuration file"),
    ("hypervisor__enable_annotations", "is refused"),
    ("hypervisor__kernel_hash", "is refused: katashim does not verify hashes"),
    ("hypervisr__kernel", "is unknown: there is no component hypervisr; did you mean hypervisor?"),
])
def test_unknown_and_refused(disk, name, why):
    assert f"annotation {PREFIX}{name.replace('__', '.')} {why}" in problem_of(disk, ALL, **{name: "x"})


def test_all_problems_are_told_at_once(disk):
    with pytest.raises(InvalidConfig) as caught:
        disk.toml(annotations=asked(agent__zzz="1", hypervisor__kernel_params="a", runtime__vfio_mode="x"))
    assert len(caught.value.problems) == 3


def test_other_annotations_are_not_ours(disk):
    config = disk.toml(annotations={"io.kubernetes.cri.container-type": "sandbox", "cdi.k8s.io/x": "y",
                                    "io.katacontainers.pkg.oci.bundle_path": "/b"})
    assert config.warnings == ()


def test_a_pod_does_not_choose_the_file(disk):
    config = disk.toml(annotations={"io.katacontainers.config_path": "/etc/other.toml"})
    assert "io.katacontainers.config_path is not honoured" in config.warnings[0]


# -- values ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "size_mb"), [
    ("2048", 2048), ("512M", 512), ("512 MiB", 512), ("2 GiB", 2048), ("2g", 2048), ("1.5G", 1536),
    ("1048576k", 1024), ("536870912b", 512)])
def test_memory_units(disk, text, size_mb):
    config = disk.toml(ALL, annotations=asked(hypervisor__default_memory=text))
    assert config.hypervisor.default_memory == size_mb


@pytest.mark.parametrize(("name", "text", "why"), [
    ("default_memory", "much", 'is "much", wants a size such as'),
    ("default_memory", "5 parsecs", "wants a size such as"),
    ("default_memory", "-5", "wants a size such as"),
    ("default_memory", "1k", "is 0, must be 1 to"),
    ("default_vcpus", "two", 'is "two", wants a number'),
    ("enable_iommu", "maybe", "wants true or false"),
    ("network_queues", "257", "is 257, must be 1 to 256"),
    ("pcie_root_port", "17", "is 17, must be 16 at most"),
    ("pcie_switch_port", "17", "is 17, must be 16 at most"),
    ("hugepage_type", "big", "must be one of hugetlbfs, thp"),
    ("kernel", "/no/kernel", "names /no/kernel, which does not exist"),
    ("kernel_params", 'a="b', "a quote is not closed"),
    ("cc_init_data", "!!", "is not base64 of gzip of TOML"),
    ("cc_init_data", base64.b64encode(b"plain").decode(), "is not base64 of gzip of TOML"),
    ("cc_init_data", base64.b64encode(gzip.compress(b"x" * 9)[:-9]).decode(), "is cut off or too long"),
    ("cc_init_data", base64.b64encode(gzip.compress(b"x" * (17 << 20))).decode(), "is cut off or too long"),
])
def test_wrong_values(disk, name, text, why):
    assert why in problem_of(disk, ALL, **{f"hypervisor__{name}": text})


def test_wrong_values_of_the_agent(disk):
    assert "is not base64 of text" in problem_of(disk, "", agent__policy="***")
    assert "is not JSON" in problem_of(disk, "", runtime__shared_mounts="{")


def test_a_size_above_the_limit(disk):
    assert "default_vcpus is 4, more than default_maxvcpus, 2" in problem_of(
        disk, ALL + "\ndefault_maxvcpus = 2", hypervisor__default_vcpus="4")


def test_renamed(disk):
    config = disk.toml(ALL, annotations=asked(
        hypervisor__default_max_vcpus="3", hypervisor__blk_logical_sector_size="512",
        hypervisor__blk_physical_sector_size="4096", hypervisor__block_device_num_queues="2",
        hypervisor__block_device_queue_size="256"))
    hypervisor = config.hypervisor
    assert (hypervisor.default_maxvcpus, hypervisor.num_queues, hypervisor.queue_size) == (3, 2, 256)
    assert hypervisor.block_device_logical_sector_size == 512
    assert hypervisor.block_device_physical_sector_size == 4096


def test_kernel_params_replace_words_of_their_name(disk):
    config = disk.toml(ALL + '\nkernel_params = "a=1 b=2"',
                       annotations=asked(hypervisor__kernel_params="b=3 c"))
    assert config.hypervisor.kernel_params == "a=1 b=3 c"


def test_virtiofsd_arguments_are_added(disk):
    config = disk.toml(ALL + '\nvirtio_fs_extra_args = ["-d"]',
                       annotations=asked(hypervisor__virtio_fs_extra_args="--a, --b=c"))
    assert config.hypervisor.virtio_fs_extra_args == ("-d", "--a", "--b=c")


def test_initdata(disk):
    text = 'algorithm = "sha384"\nversion = "0.1.0"\n'
    packed = base64.b64encode(gzip.compress(text.encode())).decode()
    assert disk.toml(ALL, annotations=asked(hypervisor__cc_init_data=packed)).hypervisor.initdata == text


def test_shared_mounts(disk):
    mounts = '[{"name": "n", "src_ctr": "a", "src_path": "/s", "dst_ctr": "b", "dst_path": "/d"}]'
    row, = disk.toml(annotations=asked(runtime__shared_mounts=mounts)).runtime.shared_mounts
    assert (row.name, row.dst_path) == ("n", "/d")


def test_an_image_takes_the_place_of_an_initrd_and_the_other_way_round(disk):
    new = disk.write("new.img", "")
    config = disk.toml(ALL, annotations=asked(hypervisor__initrd=new))
    assert (config.hypervisor.image, config.hypervisor.initrd) == ("", new)
    config = disk.load("b.toml", f"[hypervisor.qemu]\nkernel='/k'\ninitrd='/r'\n{ALL}\n",
                       annotations=asked(hypervisor__image=new))
    assert (config.hypervisor.image, config.hypervisor.initrd) == (new, "")
    assert "image and initrd are both set" in problem_of(
        disk, ALL, hypervisor__image=new, hypervisor__initrd=new)


def test_an_initrd_over_the_packaged_guest(disk):
    new = disk.write("new.img", "")
    config = disk.load("a.conf", '[hypervisor]\n[[qemu]]\nenable_annotations = initrd\n',
                       annotations=asked(hypervisor__initrd=new))
    hypervisor = config.hypervisor
    assert (hypervisor.image, hypervisor.initrd, hypervisor.boot_initrd) == ("", new, "")


# -- paths ----------------------------------------------------------------------------------------
def test_paths_must_match_their_list(disk):
    lists = ALL + '\nvalid_hypervisor_paths = ["/usr/bin/qemu-*"]'
    config = disk.toml(lists, annotations=asked(hypervisor__path="/usr/bin/qemu-system-x86_64"))
    assert config.hypervisor.path == "/usr/bin/qemu-system-x86_64"
    for path in ("/usr/bin/evil", "/usr/bin/qemu-x/evil", "/x/usr/bin/qemu-1"):
        assert f"is {path}, which matches none of valid_hypervisor_paths" in problem_of(
            disk, lists, hypervisor__path=path)
    assert "none of valid_virtio_fs_daemon_paths (empty)" in problem_of(
        disk, ALL, hypervisor__virtio_fs_daemon="/v")


def test_paths_may_not_climb(disk):
    lists = ALL + '\nvalid_hypervisor_paths = ["/usr/*/*/evil"]'
    assert "must be a path without . and .." in problem_of(disk, lists, hypervisor__path="/usr/bin/../evil")


@pytest.mark.parametrize(("pattern", "path", "matches"), [
    ("/usr/bin/*", "/usr/bin/x", True), ("/usr/bin/*", "/usr/bin/x/y", False), ("/a?c", "/abc", True),
    ("/a?c", "/a/c", False), ("/[ab]x", "/ax", True), ("/[!ab]x", "/ax", False), ("/[!ab]x", "/cx", True),
    ("/a.b", "/axb", False), ("/a[", "/a[", True), ("/a+(b)", "/a+(b)", True), ("/[]]x", "/]x", True)])
def test_globs(pattern, path, matches):
    assert bool(_glob(pattern).fullmatch(path)) is matches


# -- other tables ---------------------------------------------------------------------------------
def test_a_pod_chooses_among_the_tables_there_are(disk):
    text = ("[hypervisor.qemu]\nkernel='/k'\nimage='/i'\n[hypervisor.clh]\nkernel='/c'\nimage='/i'\n"
            "[agent.kata]\n[agent.other]\n[runtime]\nhypervisor_name='qemu'\nagent_name='kata'\n")
    config = disk.load("a.toml", text, annotations=asked(
        runtime__hypervisor_name="clh", runtime__agent_name="other"))
    assert (config.hypervisor.name, config.hypervisor.kernel, config.agent.name) == ("clh", "/c", "other")
    with pytest.raises(InvalidConfig, match=r"there is no \[hypervisor.../../x\], only qemu"):
        disk.load("a.conf", "", annotations=asked(runtime__hypervisor_name="../../x"))
    with pytest.raises(InvalidConfig, match=r"there is no \[hypervisor.remote\]"):
        disk.load("a.toml", text, annotations=asked(runtime__hypervisor_name="remote"))
