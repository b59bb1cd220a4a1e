"""Building the guest: the same bytes from the same inputs, at once when nothing changed, and without
network."""

import json
import os
import subprocess
import sys
import time

import pytest

from katashim.errors import InvalidArgument
from katashim.guest import build, cache

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
cached = pytest.mark.skipif(not os.path.isdir(cache.DEFAULT_DIR),
                            reason="no guest was built on this machine yet")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """``(directory, manifest)`` of a guest that was built from what is cached."""
    directory = str(tmp_path_factory.mktemp("guest"))
    return directory, build.build(directory, progress=lambda text: None)


def test_there_is_no_other_kernel(tmp_path):
    with pytest.raises(InvalidArgument, match="'windows'"):
        build.build(str(tmp_path), "windows")


def test_a_directory_without_a_manifest_holds_no_guest(tmp_path):
    assert build.read_manifest(str(tmp_path)) is None
    (tmp_path / "manifest.json").write_text("{")
    assert build.read_manifest(str(tmp_path)) is None
    (tmp_path / "manifest.json").write_text('{"format": 999}')
    assert build.read_manifest(str(tmp_path)) is None


@pytest.mark.vm
@cached
def test_the_manifest_tells_what_is_there(built):
    directory, manifest = built
    assert set(manifest["files"]) == {"vmlinux", "initrd.img", "rootfs.img"}
    for name, facts in manifest["files"].items():
        assert cache.file_hash(f"{directory}/{name}") == facts["sha256"]
        assert os.path.getsize(f"{directory}/{name}") == facts["bytes"]
    assert {"crun", "python3-minimal", "libc6", f"linux-image-{manifest['kernel']['release']}"} <= set(
        manifest["packages"])
    assert manifest == build.read_manifest(directory)
    assert sorted(name for name in os.listdir(directory) if not name.startswith(".")) == [
        "initrd.img", "manifest.json", "rootfs.img", "vmlinux"]


@pytest.mark.vm
@cached
def test_another_build_makes_the_same_bytes(built, tmp_path):
    assert build.build(str(tmp_path), progress=lambda text: None) == built[1]


@pytest.mark.vm
@cached
def test_a_second_run_finds_all_done(built):
    before = os.stat(f"{built[0]}/rootfs.img")
    steps = []
    start = time.monotonic()
    assert build.build(built[0], progress=steps.append) == built[1]
    assert time.monotonic() - start < 2
    assert steps == [f"the guest in {built[0]} is up to date"]
    assert os.stat(f"{built[0]}/rootfs.img").st_ino == before.st_ino


@pytest.mark.vm
@cached
def test_a_file_that_was_cut_short_is_made_again(built):
    os.truncate(f"{built[0]}/initrd.img", 100)
    assert build.build(built[0], progress=lambda text: None) == built[1]
    assert cache.file_hash(f"{built[0]}/initrd.img") == built[1]["files"]["initrd.img"]["sha256"]


@pytest.mark.vm
@cached
def test_it_works_without_network_and_as_a_program(tmp_path, built):
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "katashim.guest.cli", "build", "--output",
         str(tmp_path / "guest")],
        cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "writing the root image" in done.stdout
    shown = subprocess.run([sys.executable, "-m", "katashim.guest.cli", "show", "--output",
                            str(tmp_path / "guest")],
                           cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert json.loads(shown.stdout) == built[1]


def test_nothing_to_show_is_an_error_that_says_what_to_do(tmp_path):
    done = subprocess.run([sys.executable, "-m", "katashim.guest.cli", "show", "--output", str(tmp_path)],
                          cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "katashim-ctl guest build" in done.stderr
