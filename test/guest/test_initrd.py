"""The initial RAM disk's archive, read back by cpio itself."""

import os
import subprocess

from katashim.guest import initrd


def members(data, directory):
    """Unpack `data` with cpio into `directory`; returns what it lists."""
    listing = subprocess.run(["cpio", "-i", "-d", "-v", "--quiet", "--no-absolute-filenames"], input=data,
                             cwd=directory, check=True, capture_output=True)
    return listing.stderr.decode().split("\n")[:-1]


def test_cpio_reads_what_is_written(tmp_path):
    archive = initrd.Archive()
    archive.directory("bin")
    archive.file("bin/odd", b"x" * 7, 0o755)
    archive.file("empty", b"")
    archive.link("bin/link", "odd")
    data = archive.bytes()
    assert members(data, tmp_path) == ["bin", "bin/odd", "empty", "bin/link"]
    assert (tmp_path / "bin" / "link").read_bytes() == b"x" * 7
    assert os.stat(tmp_path / "bin" / "odd").st_mode & 0o777 == 0o755
    assert len(data) % 512 == 0


def module(directory, name, depends="", alias=""):
    """A file that carries a module's information as a real one does."""
    fields = [b"license=GPL", b"depends=" + depends.encode(),
              *([b"alias=" + alias.encode()] if alias else []), b""]
    (directory / f"{name}.ko").write_bytes(b"\x7fELF\0" + b"\0".join(fields))


def layers(tmp_path):
    """A base layer and a kernel layer with a few modules."""
    base, kernel = tmp_path / "base", tmp_path / "kernel"
    (base / "tree" / "bin").mkdir(parents=True)
    (base / "tree" / "bin" / "busybox").write_bytes(b"busybox")
    (kernel / "modules").mkdir(parents=True)
    (kernel / "release").write_text("6.1.0-test")
    module(kernel / "modules", "virtio", "virtio_ring")
    module(kernel / "modules", "virtio_ring")
    module(kernel / "modules", "virtio_blk", "virtio,virtio_ring")
    module(kernel / "modules", "unrelated")
    return str(base), str(kernel)


def test_it_holds_busybox_the_script_and_the_modules_that_reach_the_root(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    listed = members(initrd.make(*layers(tmp_path)), out)
    assert {"bin/busybox", "init", "modules", "dev/console"} <= set(listed)
    assert (out / "modules").read_text() == "virtio_blk\n"
    assert "lib/modules/6.1.0-test/unrelated.ko" not in listed
    assert (out / "lib/modules/6.1.0-test/modules.dep").read_text().split("\n") == [
        "virtio_ring.ko:", "virtio.ko: virtio_ring.ko", "virtio_blk.ko: virtio.ko virtio_ring.ko", ""]


def test_the_same_input_makes_the_same_bytes(tmp_path):
    made = layers(tmp_path)
    assert initrd.make(*made) == initrd.make(*made)


def test_it_can_carry_the_root_along(tmp_path):
    (tmp_path / "root.img").write_bytes(b"root")
    assert "rootfs.img" in members(initrd.make(*layers(tmp_path), rootfs=str(tmp_path / "root.img")),
                                   tmp_path)
