import pytest

from katashim.config import Host, load
from katashim.resources.cpumem import (
    SANDBOX_CPU_PERIOD,
    SANDBOX_CPU_QUOTA,
    SANDBOX_MEMORY,
    Workload,
    container_workload,
    explain_size,
    sandbox_size,
    sandbox_workload,
    sized,
    total_size,
)

GIB = 1 << 30
PREFIX = "io.katacontainers.config.hypervisor."


@pytest.fixture
def configured(tmp_path):
    """Makes a Config of lines for [hypervisor.qemu]: static sizing, 1 vCPU, 2048 MiB, 8 CPUs, 16 GiB."""
    def make(*lines, static=True, annotations=None):
        path = tmp_path / "a.toml"
        text = ("[hypervisor.qemu]\nkernel='/k'\nimage='/i'\ndefault_memory=2048\n"
                "enable_annotations=['default_.*']\n") + "\n".join(lines)
        path.write_text(f"{text}\n[runtime]\nstatic_sandbox_resource_mgmt={str(static).lower()}\n")
        return load(str(path), env={}, annotations=annotations, host=Host(8, 16384))
    return make


def container(quota=None, period=None, memory=None, **more):
    resources = {"cpu": {"quota": quota, "period": period}, "memory": {"limit": memory}, **more}
    return {"linux": {"resources": resources}}


def pod(quota=0, period=0, memory=0):
    return {"annotations": {SANDBOX_CPU_QUOTA: str(quota), SANDBOX_CPU_PERIOD: str(period),
                            SANDBOX_MEMORY: str(memory)}}


# -- workloads ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("spec", "cpus", "memory_mb"), [
    ({}, 0, 0),
    ({"linux": None, "annotations": None}, 0, 0),
    (container(), 0, 0),
    (container(150000, 100000, GIB), 1.5, 1024),
    (container(150000, None, GIB), 1.5, 1024),             # the kernel's period
    (container(-1, 100000, -1), 0, 0),                     # unlimited, as runtimes write it
    (container(0, 100000, 0x7FFFFFFFFFFFF000), 0, 0),
    (container(memory=GIB + 1), 0, 1025),
    (container(memory=GIB, hugepageLimits=[{"pageSize": "2MB", "limit": GIB}]), 0, 2048),
    (container(hugepageLimits=[{"pageSize": "2MB", "limit": GIB}]), 0, 0),
    (pod(200000, 100000, 2 * GIB), 2, 2048),
    (pod(0, 100000, 0), 0, 0),
    (pod("x", "y", ""), 0, 0),
    ({**pod(memory=GIB), **container(quota=300000, period=100000)}, 3, 1024),
    ({**pod(100000, 100000, GIB), **container(300000, 100000, 5 * GIB)}, 1, 1024),
])
def test_sandbox_workload(spec, cpus, memory_mb):
    assert sandbox_workload(spec) == Workload(cpus, memory_mb)


def test_container_workload_of_nothing():
    assert container_workload(None) == container_workload({}) == Workload()


# -- static sizing --------------------------------------------------------------------------------
@pytest.mark.parametrize(("lines", "spec", "size"), [
    ([], {}, (1, 2048)),
    (["default_vcpus=2.5"], {}, (3, 2048)),
    ([], container(150000, 100000, GIB), (2, 1024)),
    (["overhead_vcpus=0.2", "overhead_memory=192"], container(100000, 100000, GIB), (2, 1216)),
    (["overhead_vcpus=0.2"], container(10000, 100000), (1, 2048)),                     # never less than one
    (["overhead_memory=32"], container(memory=GIB + 1), (1, 1058)),                    # 1057, made even
    (["default_vcpus=4"], container(memory=GIB), (4, 1024)),           # a memory limit leaves the vCPUs alone
    ([], container(200000, 100000), (2, 2048)),                        # and the other way round
    ([], container(memory=1 << 20), (1, 64)),                          # what a kernel can boot in
    ([], container(2000000, 100000, 64 * GIB), (8, 16384)),            # no more than the host has
    (["default_maxvcpus=2", "default_maxmemory=3001"], container(400000, 100000, 4 * GIB), (2, 3000)),
    ([], pod(300000, 100000, 4 * GIB), (3, 4096)),
    (["overhead_vcpus=0.1"], container(90000, 100000), (1, 2048)),     # 0.1 + 0.9 is one CPU, not two
])
def test_static_size(configured, lines, spec, size):
    assert sandbox_size(configured(*lines), spec) == size


def test_an_annotation_is_a_floor(configured):
    config = configured(annotations={f"{PREFIX}default_vcpus": "4", f"{PREFIX}default_memory": "3 GiB"})
    assert sandbox_size(config, {}) == (4, 3072)
    assert sandbox_size(config, container(200000, 100000, GIB)) == (4, 3072)
    assert sandbox_size(config, container(600000, 100000, 4 * GIB)) == (6, 4096)
    assert sandbox_size(config, container(memory=4 * GIB)) == (4, 4096)


def test_the_reasons(configured):
    config = configured("overhead_memory=192", "default_maxvcpus=2")
    size = explain_size(config, container(400000, 100000, GIB))
    assert size.why_vcpus == "default_maxvcpus, less than 4 (static sizing: overhead_vcpus 0 + limit 4 CPUs)"
    assert size.why_memory == "static sizing: overhead_memory 192 + limit 1024 MiB"
    size = explain_size(config, {})
    assert size.why_memory == f"no memory limit: default_memory ({config.path}:4)"


def test_sized_config_tells_why(configured):
    config = sized(configured(), container(200000, 100000, GIB))
    assert (config.hypervisor.default_vcpus, config.hypervisor.default_memory) == (2.0, 1024)
    assert (config.hypervisor.default_maxvcpus, config.hypervisor.default_maxmemory) == (2, 1024)
    source = config.source("hypervisor.default_memory")
    assert source.where == "static sizing: overhead_memory 0 + limit 1024 MiB" and source.below.value == 2048


# -- not static -----------------------------------------------------------------------------------
def test_dynamic_size_adds_to_the_default(configured):
    config = configured(static=False)
    assert sandbox_size(config, {}) == (1, 2048)
    assert sandbox_size(config, container(150000, 100000, GIB)) == (3, 3072)
    kept = sized(config, container(150000, 100000, GIB))
    assert (kept.hypervisor.default_maxvcpus, kept.hypervisor.default_maxmemory) == (8, 16384)


def test_total_size_is_the_sum_over_live_containers(configured):
    config = configured(static=False)
    one = container(50000, 100000, GIB)["linux"]["resources"]
    two = container(25000, 50000)["linux"]["resources"]
    assert total_size(config, []) == (1, 2048)
    assert total_size(config, [one]) == (2, 3072)
    assert total_size(config, [one, two]) == (2, 3072)
    assert total_size(config, [one] * 40) == (8, 16384)
