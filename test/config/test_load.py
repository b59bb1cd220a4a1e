import os
import subprocess
import sys

import pytest

from katashim.config import Host, InvalidConfig, files, load
from katashim.errors import NotFound

HOST = Host(cpus=8, memory_mb=16384)
GUEST = "/var/lib/katashim/guest"
PACKAGED = os.path.realpath(files.packaged("qemu.conf"))


def problems_of(call, *args, **kwargs):
    with pytest.raises(InvalidConfig) as caught:
        call(*args, **kwargs)
    return caught.value.problems


# -- defaults -------------------------------------------------------------------------------------
def test_the_packaged_defaults(disk):
    config = load(env={}, host=HOST)
    hypervisor = config.hypervisor
    assert (hypervisor.name, hypervisor.path) == ("qemu", "/usr/bin/qemu-system-x86_64")
    assert hypervisor.kernel == "/var/lib/katashim/guest/vmlinux"
    assert hypervisor.image == "/var/lib/katashim/guest/rootfs.img"
    assert hypervisor.boot_initrd == "/var/lib/katashim/guest/initrd.img"
    assert hypervisor.kernel_params == "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all"
    assert (hypervisor.accel, hypervisor.machine_type, hypervisor.shared_fs) == ("auto", "q35", "virtio-fs")
    assert (hypervisor.default_vcpus, hypervisor.default_memory) == (1.0, 2048)
    assert (hypervisor.default_maxvcpus, hypervisor.default_maxmemory) == (8, 16384)
    assert config.agent.name == "kata" and config.agent.mem_agent.memcg_period_secs == 600
    assert config.runtime.static_sandbox_resource_mgmt and config.runtime.sandbox_cgroup_only
    assert config.files == (PACKAGED,) and config.path == PACKAGED and config.warnings == ()


def test_a_toml_file_stands_alone_with_katas_defaults(disk):
    config = disk.toml()
    assert config.hypervisor.shared_fs == "none"
    assert config.hypervisor.boot_initrd == "" and config.hypervisor.rootfs_type == "ext4"
    assert config.hypervisor.default_memory == 128 and not config.runtime.static_sandbox_resource_mgmt
    assert config.files == (config.path,)


def test_a_conf_file_states_what_differs(disk):
    config = disk.load("a.conf", "[hypervisor]\n[[qemu]]\ndefault_memory = 512\n")
    assert config.hypervisor.default_memory == 512
    assert config.hypervisor.kernel == "/var/lib/katashim/guest/vmlinux"
    assert config.files == (PACKAGED, config.path)
    source = config.source("hypervisor.qemu.default_memory")
    assert source.where == f"{config.path}:3"
    assert source.below.value == 2048 and source.below.where.startswith(f"{PACKAGED}:")


@pytest.mark.parametrize(("set_here", "kernel", "boot_initrd", "image", "rootfs_type"), [
    ("", f"{GUEST}/vmlinux", f"{GUEST}/initrd.img", f"{GUEST}/rootfs.img", "erofs"),
    ("kernel = /k", "/k", "", f"{GUEST}/rootfs.img", "erofs"),
    ("image = /i", f"{GUEST}/vmlinux", f"{GUEST}/initrd.img", "/i", "ext4"),
    ("initrd = /r", f"{GUEST}/vmlinux", "", "", "ext4"),
    ("kernel = /k\nboot_initrd = /b", "/k", "/b", f"{GUEST}/rootfs.img", "erofs"),
    ("image = /i\nrootfs_type = xfs", f"{GUEST}/vmlinux", f"{GUEST}/initrd.img", "/i", "xfs"),
])
def test_packaged_guest_files_give_way_to_ones_own(disk, set_here, kernel, boot_initrd, image, rootfs_type):
    hypervisor = disk.load("a.conf", f"[hypervisor]\n[[qemu]]\n{set_here}\n").hypervisor
    assert (hypervisor.kernel, hypervisor.boot_initrd, hypervisor.image, hypervisor.rootfs_type) == (
        kernel, boot_initrd, image, rootfs_type)


# -- layers ---------------------------------------------------------------------------------------
def test_drop_ins_merge_over_the_base(disk):
    disk.write("config.d/10.toml", "[hypervisor.qemu]\ndefault_memory = 1024\nvirtio_fs_extra_args = ['x']\n")
    disk.write("config.d/20.conf", "[hypervisor]\n[[qemu]]\ndefault_memory = 3072\n[agent]\n[[kata]]\n"
                                   "enable_debug = yes\n")
    config = disk.toml('default_vcpus = 2\nvirtio_fs_extra_args = ["a", "b"]')
    assert config.hypervisor.default_memory == 3072
    assert config.hypervisor.virtio_fs_extra_args == ("x",)         # lists replace
    assert config.hypervisor.default_vcpus == 2.0 and config.agent.enable_debug
    where = config.source("hypervisor.default_memory")
    assert [where.where, where.below.where] == [f"{disk.directory}/config.d/20.conf:3",
                                                f"{disk.directory}/config.d/10.toml:2"]


def test_drop_ins_over_the_packaged_defaults(disk):
    disk.write("etc/config.d/a.conf", "[runtime]\nenable_debug = true\n")
    config = load(env={}, host=HOST)
    assert config.runtime.enable_debug and config.hypervisor.default_memory == 2048


def test_a_passed_over_drop_in_is_a_warning(disk):
    disk.write("config.d/notes.txt", "")
    assert [text for text in disk.toml().warnings if "notes.txt is not read" in text]


def test_a_copy_of_the_packaged_file_works(disk):
    with open(PACKAGED, encoding="utf-8") as file:
        config = disk.load("copy.conf", file.read())
    assert config.warnings == () and config.source("hypervisor.kernel").where.startswith(config.path)


# -- which tables ---------------------------------------------------------------------------------
def test_the_only_table_is_selected_as_in_go_files(disk):
    config = disk.load("go.toml", "[hypervisor.clh]\nkernel='/k'\nimage='/i'\n[agent.other]\n[runtime]\n")
    assert (config.hypervisor.name, config.agent.name) == ("clh", "other")
    assert config.runtime.hypervisor_name == "clh"
    assert config.source("runtime.hypervisor_name").where == "the only [hypervisor.NAME]"


def test_a_conf_with_another_driver(disk):
    config = disk.load("a.conf", "[hypervisor]\n[[clh]]\nkernel = /k\nimage = /i\n")
    assert config.hypervisor.name == "clh" and config.hypervisor.path == "/usr/bin/cloud-hypervisor"
    assert config.runtime.sandbox_cgroup_only                       # the rest of the packaged file


def test_katas_other_name_of_clh(disk):
    config = disk.load("a.toml", "[hypervisor.cloud-hypervisor]\nkernel='/k'\nimage='/i'\n"
                                 "[runtime]\nhypervisor_name='cloud-hypervisor'\n")
    assert config.hypervisor.name == "clh"


def test_several_tables_need_a_name(disk):
    text = "[hypervisor.qemu]\n[hypervisor.clh]\n"
    assert "several [hypervisor.NAME], clh, qemu: hypervisor_name must name one" in \
        problems_of(disk.load, "a.toml", text)[0]


def test_a_named_table_must_exist(disk):
    assert "there is no [hypervisor.clh], only qemu" in problems_of(
        disk.load, "a.toml", "[hypervisor.qemu]\n[runtime]\nhypervisor_name='clh'\n")[0]
    assert "there is no [agent.kata], only other" in problems_of(
        disk.load, "a.toml", "[hypervisor.qemu]\n[agent.other]\n[runtime]\nagent_name='kata'\n")[0]
    assert "there is no [hypervisor.qemu]" in problems_of(disk.load, "a.toml", "")[0]


# -- problems -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "line", "problem"), [
    ("[hypervisor.qemu]\ndefault_memroy = 1\n", 2,
     "[hypervisor.qemu] has no setting default_memroy; did you mean default_memory?"),
    ("[hypervisor.qemu]\n\ndefault_memory = '1'\n", 3,
     'hypervisor.qemu.default_memory is "1", wants an integer'),
    ("[runtime]\nlog_level = 'loud'\n", 2, 'runtime.log_level is "loud", must be one of trace, debug'),
    ("[agent.kata.mem_agent]\nfoo = 1\n", 2, "[agent.kata.mem_agent] has no setting foo"),
    ("[hypervisor.qemo]\n", 1, "there is no hypervisor qemo; did you mean qemu?"),
    ("[hypervisor]\nkernel = '/k'\n", 2,
     "kernel stands in [hypervisor]; it belongs into a table such as [hypervisor.qemu]"),
    ("[runtim]\n", 1, "there is no section [runtim]; did you mean runtime?"),
    ("runtime = 3\n", 1, "runtime is a section, not a setting"),
    ("[factory]\nfoo = 1\n", 2, "[factory] has no setting foo"),
    ("[hypervisor.qemu]\nfactory = 1\n", 2, "[hypervisor.qemu] has no setting factory"),
    ("[runtime]\nhypervisor_name = 5\n", 2, "runtime.hypervisor_name is 5, wants a string"),
    ("[agent.kata]\ndial_timeout = -1\n", 2, "dial_timeout: -1 is out of range"),
    ("[agent.kata]\ndial_timeout = true\n", 2, "dial_timeout: wants an integer, in seconds"),
])
def test_each_problem_has_its_line(disk, text, line, problem):
    found = problems_of(disk.load, "a.toml", text)
    assert any(one.startswith(f"{disk.directory}/a.toml:{line}: {problem}") for one in found), found


def test_all_problems_are_told_at_once(disk):
    disk.write("config.d/x.conf", "[runtime]\nbad = 1\n")
    problems = problems_of(disk.toml, "one = 1\ndefault_vcpus = 'x'")
    assert len(problems) == 3 and problems[2].startswith(f"{disk.directory}/config.d/x.conf:2")


def test_the_tables_of_other_drivers_are_checked_too(disk):
    text = ("[hypervisor.qemu]\nkernel='/k'\nimage='/i'\n[hypervisor.clh]\nfoo=1\n"
            "[runtime]\nhypervisor_name='qemu'\n")
    assert "[hypervisor.clh] has no setting foo" in problems_of(disk.load, "a.toml", text)[0]


def test_values_of_other_drivers_do_not_count(disk):
    text = ("[hypervisor.clh]\nkernel='/other'\n[hypervisor.qemu]\nkernel='/k'\nimage='/i'\n"
            "[runtime]\nhypervisor_name='qemu'\n")
    assert disk.load("a.toml", text).hypervisor.kernel == "/k"


def test_a_comma_in_a_conf_value_asks_for_quotes(disk):
    problem, = problems_of(disk.load, "a.conf", "[hypervisor]\n[[qemu]]\nkernel_params = a=1,2\n")
    assert problem.endswith("a.conf:3: hypervisor.qemu.kernel_params is a list, wants a string: "
                            "put a value with commas in quotes")
    config = disk.load("a.conf", '[hypervisor]\n[[qemu]]\nkernel_params = "a=1,2"\n')
    assert config.hypervisor.kernel_params == "a=1,2"


def test_no_interpolation_in_a_conf(disk):
    config = disk.load("a.conf", "[hypervisor]\n[[qemu]]\nkernel_params = a=%(b)s $c\n")
    assert config.hypervisor.kernel_params == "a=%(b)s $c"


# -- older names ----------------------------------------------------------------------------------
def test_names_of_the_go_runtime(disk):
    config = disk.load("go.toml", """
[hypervisor.qemu]
kernel = "/k"
image = "/i"
seccompsandbox = "on"
hypervisor_loglevel = 3
[factory]
enable_template = true
[agent.kata]
dial_timeout = 45
cdh_api_timeout = 50
[runtime]
create_container_timeout = 60
guest_selinux_label = "u:r:t"
experimental = ["a"]
experimental_force_guest_pull = true
""")
    assert config.hypervisor.seccomp_sandbox == "on" and config.hypervisor.log_level == "trace"
    assert config.hypervisor.factory.enable_template and config.hypervisor.selinux_label == "u:r:t"
    assert config.agent.reconnect_timeout_ms == 45000 and config.agent.cdh_api_timeout_ms == 50000
    assert config.agent.create_container_timeout == 60
    assert config.runtime.experimental == ("a", "force_guest_pull")
    assert config.source("agent.reconnect_timeout_ms").where.endswith(":10 (as dial_timeout, in seconds)")


def test_older_names_in_a_conf(disk):
    config = disk.load("a.conf", "[agent]\n[[kata]]\ndial_timeout = 45\n[runtime]\n"
                                 "experimental_force_guest_pull = false\n")
    assert config.agent.reconnect_timeout_ms == 45000 and config.runtime.experimental == ()


def test_both_names_at_once(disk):
    problem, = problems_of(disk.toml, agent="reconnect_timeout_ms = 1000\ndial_timeout = 45")
    assert "dial_timeout is another name of reconnect_timeout_ms, which is set too, at" in problem


# -- what the host bounds -------------------------------------------------------------------------
@pytest.mark.parametrize(("wanted", "vcpus"), [("0", 1.0), ("-1", 8.0), ("0.5", 0.5), ("8", 8.0), ("9", 8.0)])
def test_default_vcpus(disk, wanted, vcpus):
    assert disk.toml(f"default_vcpus = {wanted}").hypervisor.default_vcpus == vcpus


@pytest.mark.parametrize(("driver", "cpus", "wanted", "most"), [
    ("qemu", 8, 0, 8), ("qemu", 8, 4, 4), ("qemu", 8, 100, 8), ("qemu", 512, 0, 256), ("clh", 512, 300, 256),
    ("firecracker", 512, 0, 32), ("remote", 512, 0, 32), ("openvmm", 512, 0, 512)])
def test_default_maxvcpus(disk, driver, cpus, wanted, most):
    guest = "" if driver == "remote" else "kernel='/k'\nimage='/i'\n"
    text = f"[hypervisor.{driver}]\n{guest}default_memory=128\ndefault_maxvcpus={wanted}\n"
    config = disk.load("a.toml", text, host=Host(cpus, 16384))
    assert config.hypervisor.default_maxvcpus == most


def test_default_maxmemory(disk):
    assert disk.toml().hypervisor.default_maxmemory == 16384
    assert disk.toml("default_maxmemory = 99999").hypervisor.default_maxmemory == 16384
    assert disk.toml("default_maxmemory = 500").hypervisor.default_maxmemory == 500
    # Guest memory is taken as it is touched, so a default above a small host's memory is no error.
    assert disk.toml("default_memory = 2048", host=Host(1, 1024)).hypervisor.default_maxmemory == 2048


def test_reconnect_is_never_shorter_than_dial_by_default(disk):
    config = disk.toml(agent="dial_timeout_ms = 45000")             # as in Kata's own Firecracker file
    assert config.agent.reconnect_timeout_ms == 45000


# -- the result -----------------------------------------------------------------------------------
def test_agent_settings_reach_the_kernel_command_line(disk):
    config = disk.toml('kernel_params = "quiet agent.log=warn"',
                       agent="enable_debug = true\ncontainer_pipe_size = 9")
    assert config.hypervisor.kernel_params == "agent.log=warn agent.container_pipe_size=9 quiet"
    assert config.source("hypervisor.kernel_params").where.startswith("the agent's settings, then /")


def test_config_is_frozen(disk):
    config = disk.toml()
    with pytest.raises(AttributeError):
        config.hypervisor.kernel = "/x"
    with pytest.raises(AttributeError):
        config.path = "/x"


def test_source(disk):
    config = disk.toml("default_vcpus = 2")
    assert config.source("hypervisor.default_vcpus") == config.source("hypervisor.qemu.default_vcpus")
    assert config.source("agent.kata.mem_agent.memcg_swap").where == "default"
    assert config.source("agent.mem_agent.memcg_swap").value is False
    assert config.source("runtime.name").value == "virt_container"
    for wrong in ("hypervisor.clh.default_vcpus", "hypervisor.nope", "x"):
        with pytest.raises(NotFound, match="there is no setting"):
            config.source(wrong)


def test_with_values(disk):
    config = disk.toml("default_vcpus = 2")
    changed = config.with_values("static sizing", {"hypervisor.default_vcpus": 4.0})
    assert changed.hypervisor.default_vcpus == 4.0 and config.hypervisor.default_vcpus == 2.0
    source = changed.source("hypervisor.default_vcpus")
    assert source.where == "static sizing" and source.below.value == 2.0
    assert changed.hypervisor.kernel == config.hypervisor.kernel and changed.agent == config.agent


def test_the_daemon_pays_for_no_heavy_module(disk):
    program = ("import sys, katashim.config as c; config = c.load(env={}); "
               "print(config.hypervisor.name, *sorted(sys.modules))")
    words = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                           env={"PYTHONPATH": os.path.dirname(os.path.dirname(PACKAGED))}).stdout.split()
    assert words[0] == "qemu"
    heavy = {"inspect", "dataclasses", "pathlib", "argparse", "asyncio", "difflib", "tomllib",
             "logging", "configobj.validate", "katashim.config.annotations"}
    assert not heavy & set(words)
