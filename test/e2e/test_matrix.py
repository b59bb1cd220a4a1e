"""The main job with other versions of the real components: the demo, inside trees of newer Debians."""

import re

import pytest
from harness import trees

pytestmark = pytest.mark.matrix

BUILTIN = '[hypervisor]\n[[qemu]]\nvsock_backend = "builtin"\n'


@pytest.mark.parametrize(("suite", "config", "containerd"), [
    pytest.param("trixie", "", "1.7", id="trixie"),
    pytest.param("forky", "", "2.", id="forky-vhost-device-vsock"),
    pytest.param("forky", BUILTIN, "2.", id="forky-builtin-vsock"),
])
def test_the_demo(suite, config, containerd):
    ready = trees.run(suite, "sh", "test/harness/setup.sh", "environment", timeout_s=600)
    assert ready.returncode == 0, ready.stdout[-4000:]
    demo = trees.run(suite, ".venv/bin/python", "test/harness/demo.py", timeout_s=300,
                     env={"KATASHIM_DEMO_CONFIG": config})
    assert demo.returncode == 0, demo.stdout[-8000:]
    assert re.search(rf"version {re.escape(containerd)}", demo.stdout), demo.stdout
    assert demo.stdout.rstrip().endswith("leaks: none")
