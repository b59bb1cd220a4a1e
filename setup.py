"""Packaging of katashim.

`pip install .` brings the package and its tools. The shim itself is installed by `make install`: pip
drops the flags of a script's interpreter line, and containerd should not wait for an interpreter that
looks for itself (see docs/dependencies.md).
"""

import re

from setuptools import find_packages, setup


def _read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def _requirements():
    lines = (line.partition("#")[0].strip() for line in _read("requirements.txt").splitlines())
    return [line for line in lines if line and line not in ("pytest", "mock")]


setup(
    name="katashim",
    version=re.search(r'^VERSION = "(.*)"', _read("katashim/__init__.py"), re.MULTILINE).group(1),
    description="A containerd shim v2 that runs each pod in a virtual machine of its own",
    long_description=_read("README.md"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["katashim", "katashim.*"]),
    package_data={"katashim.ttrpc.proto": ["*.proto", "*.binpb"],
                  "katashim.guest": ["*.config", "*.sh"]},
    data_files=[("share/katashim/defaults", ["defaults/qemu.conf", "defaults/configspec"])],
    install_requires=_requirements(),
    extras_require={"test": ["pytest", "mock", "hypothesis"]},
    entry_points={"console_scripts": ["katashim-ctl = katashim.ctl.main:main"]},
)
