"""The configuration: what is set, what it means, and where each value came from.

    config = load(annotations=spec["annotations"])
    config.hypervisor.default_memory                    # 2048
    config.source("hypervisor.default_memory").where    # "/etc/kata-containers/configuration.toml:12"

Two formats are read: katashim's ``.conf`` (ConfigObj; see `defaults/qemu.conf`) and Kata's own
``configuration*.toml``, unchanged. `docs/configuration.md` explains both to people.
"""

from katashim.config.load import Host, load
from katashim.config.records import Agent, Config, Hypervisor, InvalidConfig, Provenance, Runtime

__all__ = ["Agent", "Config", "Host", "Hypervisor", "InvalidConfig", "Provenance", "Runtime", "load"]
