"""Kernels: unpacking a bzImage, the order of modules, what Kconfig drops."""

import gzip
import lzma
import struct
import subprocess

import pytest

from katashim.errors import InvalidArgument
from katashim.guest import kernel

ELF = b"\x7fELF" + bytes(range(256)) * 64


def bzimage(payload):
    """The least of a bzImage: a boot sector, four sectors of setup, and the payload after 100 more bytes."""
    head = bytearray(5 * 512)
    head[0x1f1] = 4
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 100, len(payload))
    return bytes(head) + bytes(100) + payload + b"what follows"


def program(*argv):
    return subprocess.run(argv, input=ELF, check=True, capture_output=True).stdout


SIZE = struct.pack("<I", len(ELF))
PAYLOADS = {
    "gzip": lambda: gzip.compress(ELF),
    "lz4": lambda: program("lz4", "-l", "-c", "-q") + SIZE,
    "zstd": lambda: program("zstd", "-c", "-q") + SIZE,
    "xz": lambda: lzma.compress(ELF, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32) + SIZE,
    "lzma": lambda: lzma.compress(ELF, lzma.FORMAT_ALONE) + SIZE,
    "bzip2": lambda: program("bzip2", "-c") + SIZE,
}


@pytest.mark.parametrize("how", sorted(PAYLOADS))
def test_every_compression_is_unpacked(how):
    assert kernel.extract(bzimage(PAYLOADS[how]())) == ELF


@pytest.mark.parametrize(("data", "words"), [
    (b"", "no x86 bzImage"), (bytes(4096), "no x86 bzImage"), (bzimage(b"nonsense"), "unknown way"),
    (bzimage(gzip.compress(b"no ELF")), "not an ELF image")])
def test_what_is_no_kernel_is_refused(data, words):
    with pytest.raises(InvalidArgument, match=words):
        kernel.extract(data)


def module(directory, name, depends="", alias=""):
    fields = [b"license=GPL", b"depends=" + depends.encode(),
              *([b"alias=" + alias.encode()] if alias else []), b""]
    (directory / f"{name}.ko").write_bytes(b"\x7fELF\0" + b"\0".join(fields))


def test_modules_come_after_what_they_need(tmp_path):
    module(tmp_path, "a", "b,c-d")
    module(tmp_path, "b", "c_d")
    module(tmp_path, "c_d")
    assert kernel.in_order(["a", "built-in"], str(tmp_path)) == ["c_d", "b", "a"]


def test_drivers_of_virtio_devices_by_their_aliases(tmp_path):
    module(tmp_path, "ring")
    module(tmp_path, "vsock_transport", "ring", "virtio:d00000013v*")
    module(tmp_path, "other", alias="pci:v00001234d*")
    assert list(kernel.virtio_drivers(str(tmp_path))) == [(19, ["ring.ko", "vsock_transport.ko"])]


def test_an_option_that_kconfig_dropped_is_named(tmp_path, monkeypatch):
    (tmp_path / "fragment").write_text("CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=n\n# CONFIG_D is not set\n")
    monkeypatch.setattr(kernel, "CONFIG", str(tmp_path / "fragment"))
    (tmp_path / "good").write_text("CONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\n")
    kernel.check_config(str(tmp_path / "good"))
    (tmp_path / "bad").write_text("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\n")
    with pytest.raises(InvalidArgument, match=r"CONFIG_B=y, CONFIG_C=n"):
        kernel.check_config(str(tmp_path / "bad"))
