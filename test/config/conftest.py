"""Configurations on disk for tests: nothing of the host's /etc is looked at."""

import os

import pytest

from katashim.config import Host, files, load

HOST = Host(cpus=8, memory_mb=16384)


class Disk:
    """Writes configuration files and loads them."""

    def __init__(self, directory):
        self.directory = str(directory)

    def write(self, name, text):
        """Write a file; `name` may have directories. Returns its path."""
        path = f"{self.directory}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def load(self, name, text, **more):
        """Load a configuration that consists of this one file."""
        more.setdefault("host", HOST)
        return load(self.write(name, text), env={}, **more)

    def toml(self, hypervisor="", *, agent="", runtime="", **more):
        """Load a small but complete Kata file, with more settings for its tables."""
        text = TOML.format(hypervisor=hypervisor, agent=agent, runtime=runtime)
        return self.load("kata.toml", text, **more)


TOML = """[hypervisor.qemu]
kernel = "/k"
image = "/i"
{hypervisor}
[agent.kata]
{agent}
[runtime]
hypervisor_name = "qemu"
agent_name = "kata"
{runtime}
"""


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SEARCH_PATH", (f"{tmp_path}/etc/configuration.conf",
                                               f"{tmp_path}/etc/configuration.toml"))
    monkeypatch.setattr(files, "OUR_DIRECTORY", f"{tmp_path}/etc")
    return Disk(tmp_path)
