"""The guest's root: Debian packages, unpacked and never configured, with the agent in them, as EROFS.

mmdebstrap's ``extract`` variant unpacks packages without running a maintainer script, which takes
15 s instead of minutes and makes the same tree every time. The root is read-only; the agent mounts
tmpfs over what must be written. The image is not compressed: under TCG the guest unpacks slower
than the host's page cache delivers.

Called by build.py; plain.
"""

import glob
import os
import shutil
import struct
import subprocess

from katashim.guest import commands, kernel, tables

SUITE = "bookworm"
PACKAGES = (
    "python3-minimal", "libpython3.11-stdlib", "crun", "busybox-static", "kmod", "iptables", "e2fsprogs",
    "libc6", "libc-bin", "base-files",
)
KERNEL_PACKAGE = {"debian": "linux-image-cloud-amd64", "source": "linux-source-6.1"}
PYTHON = "python3.11"

# Never read in the guest: 35 of 110 MB.
_UNWANTED = (
    "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian",
    "usr/share/bug", "usr/share/perl5", "usr/share/python3", "usr/share/bash-completion",
    "usr/share/zoneinfo", "usr/share/common-licenses", "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl-base", "usr/lib/locale", "usr/lib/systemd", "lib/systemd", "lib/udev",
    "var/lib/apt", "var/lib/dpkg", "var/cache", "var/log", "boot", "usr/lib/python3.11/idlelib",
    "usr/lib/python3.11/lib2to3", "usr/lib/python3.11/pydoc_data", "usr/lib/python3.11/ensurepip",
    "usr/lib/python3.11/unittest", "usr/lib/python3.11/distutils", "usr/lib/python3.11/turtledemo",
    "usr/lib/python3.11/tkinter",
)
_MOUNT_POINTS = ("proc", "sys", "dev", "run", "tmp", "mnt", "root", "var/lib", "var/tmp", "opt", "home",
                 "usr/lib/katashim")
_INIT = f"""#!/usr/bin/{PYTHON} -ISE
import sys
sys.path.append("/usr/lib/katashim")
from katashim.guest.agent.main import main
main()
"""
# The agent, and what it takes from elsewhere in this package; all of it standard library only.
_AGENT_FILES = ("__init__.py", "ttrpc/__init__.py", "ttrpc/frame.py", "guest/__init__.py",
                "guest/wire.py", "guest/agent/*.py")
_PACKAGE_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LINUX_PARTITION = 0x83
_UUID = "6b617461-7368-696d-0000-67756573740a"      # the same for every build: the content is what differs


def require_tools():
    """Check for the programs that the root is made with.

    :raises FailedPrecondition: names those that are missing, and the command that installs them.
    """
    commands.require({"mmdebstrap": "mmdebstrap", "dpkg-deb": "dpkg", "mkfs.erofs": "erofs-utils"})


def fetch_packages(directory, kernel_flavour, progress):
    """Download and unpack the packages: ``root.tar`` and ``kernel.deb`` in `directory`, with their versions
    in ``versions`` (lines of name, space, version)."""
    take_kernel = (
        'export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"; cd "$KATASHIM_LAYER"; '
        f'package=$(apt-cache depends --important {KERNEL_PACKAGE[kernel_flavour]} '
        "| sed -n 's/^ *Depends: \\(linux-image-[0-9].*\\)/\\1/p' | head -n1); "
        f'apt-get -q download "${{package:-{KERNEL_PACKAGE[kernel_flavour]}}}"; mv linux-*.deb kernel.deb')
    list_versions = ('for package in "$1"/var/cache/apt/archives/*.deb; do dpkg-deb -W "$package"; done'
                     ' > "$KATASHIM_LAYER/versions"')
    steps = {"I: downloading": "downloading Debian packages", "I: extracting": "unpacking Debian packages",
             "I: creating tarball": "packing the root's tree"}

    def on_line(line):
        for start, meaning in steps.items():
            if line.startswith(start):
                progress(meaning)

    progress("asking Debian's archive for packages")
    commands.run_logged(
        ["mmdebstrap", "--variant=extract", "--mode=root", "--format=tar", f"--include={','.join(PACKAGES)}",
         f"--extract-hook={take_kernel}", f"--extract-hook={list_versions}",
         "--aptopt=Acquire::Retries \"3\"",
         SUITE, os.path.join(directory, "root.tar")],
        os.path.join(directory, "mmdebstrap.log"), what="fetching the guest's packages", on_line=on_line,
        env={"SOURCE_DATE_EPOCH": "0", "KATASHIM_LAYER": directory})


def versions(packages_layer):
    """``{package: version}`` of what :func:`fetch_packages` brought, the kernel's package included."""
    with open(os.path.join(packages_layer, "versions")) as file:
        known = dict(line.split() for line in file)
    name, version = commands.run(["dpkg-deb", "-W", os.path.join(packages_layer, "kernel.deb")],
                                 what="reading the kernel package's version").decode().split()
    known[name] = version
    return known


def unpack_base(packages_layer, directory):
    """Make the part of the root that does not depend on us, in ``tree`` below `directory`: packages without
    what nobody reads there, and Python's modules compiled by the guest's own Python."""
    tree = os.path.join(directory, "tree")
    os.mkdir(tree)
    commands.run(["tar", "-C", tree, "-xpf", os.path.join(packages_layer, "root.tar"), "--exclude=./dev/*"],
                 what="unpacking the root")
    for path in _UNWANTED:
        _remove(os.path.join(tree, path))
    for directory_path in glob.glob(os.path.join(tree, f"usr/lib/{PYTHON}", "**", "__pycache__"),
                                    recursive=True):
        _remove(directory_path)
    _link_busybox(tree)
    _link_iptables(tree)
    compile_python(tree, f"/usr/lib/{PYTHON}")


def make_image(base_layer, kernel_layer, work, output):
    """Write the EROFS image `output`: the base tree, modules of the kernel and the agent, in `work`."""
    tree = os.path.join(work, "tree")
    commands.run(["cp", "-a", "--reflink=auto", os.path.join(base_layer, "tree"), tree],
                 what="copying the root")
    for path in _MOUNT_POINTS:
        os.makedirs(os.path.join(tree, path), exist_ok=True)
    _install_modules(kernel_layer, tree)
    _install_agent(tree)
    _list_read_ahead(tree)
    _install_etc(tree)
    commands.run(["mkfs.erofs", "--quiet", "-T0", "--all-root", f"-U{_UUID}", "-x-1", output, tree],
                 what="writing the root image")
    _add_partition_table(output)


def _add_partition_table(image):
    """Describe the whole image as its own first partition.

    EROFS leaves its first 1024 bytes free, and a partition may begin at sector 0. So the image is mounted as
    /dev/vda by those who know it and as /dev/vda1 by hosts that are used to Kata's images, with a table.
    """
    sectors = os.path.getsize(image) // 512
    any_cylinder = b"\xff\xff\xff"
    entry = struct.pack("<B3sB3sII", 0, any_cylinder, _LINUX_PARTITION, any_cylinder, 0, sectors)
    with open(image, "r+b") as file:
        file.seek(446)
        file.write(entry.ljust(64, b"\0") + b"\x55\xaa")


def agent_sources():
    """Paths of all files of this package that end up in the guest."""
    return sorted(path for pattern in _AGENT_FILES for path in glob.glob(os.path.join(_PACKAGE_DIR, pattern)))


def compile_python(tree, path):
    """Compile the modules below `path` in `tree` with the guest's Python.

    The .pyc never look at their source's time (unchecked-hash), so they depend on its text alone.
    """
    commands.run(["chroot", tree, f"/usr/bin/{PYTHON}", "-ISE", "-m", "compileall", "-q", "-x", "/test/|bad_",
                  "--invalidation-mode", "unchecked-hash", path],
                 what=f"compiling {path}", env={"PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": "0"})


def _install_agent(tree):
    base = os.path.join(tree, "usr/lib/katashim/katashim")
    for path in agent_sources():
        target = os.path.join(base, os.path.relpath(path, _PACKAGE_DIR))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(path, target)
    with open(os.path.join(base, "guest", "agent", "messages.py"), "w") as file:
        file.write(tables.source())
    compile_python(tree, "/usr/lib/katashim")
    for name in ("sbin/init", "usr/bin/kata-agent"):
        path = os.path.join(tree, name)
        _remove(path)
        with open(path, "w") as file:
            file.write(_INIT)
        os.chmod(path, 0o755)


def _install_modules(kernel_layer, tree):
    """Modules where modprobe and the agent look for them, with the indexes of depmod."""
    with open(os.path.join(kernel_layer, "release")) as file:
        release = file.read()
    target = os.path.join(tree, "lib/modules", release)
    os.makedirs(target)
    for path in sorted(glob.glob(os.path.join(kernel_layer, "modules", "*.ko"))):
        shutil.copy(path, target)
    with open(os.path.join(target, "virtio.order"), "w") as file:
        file.write("".join(f"{number} {' '.join(names)}\n" for number, names in kernel.virtio_drivers(
            os.path.join(kernel_layer, "modules"))))
    for name in ("modules.builtin", "modules.order"):
        open(os.path.join(target, name), "w").close()
    commands.run(["chroot", tree, "/sbin/depmod", release], what="indexing the modules")


def _list_read_ahead(tree):
    """Write down what crun is made of, for the agent to have it read before the first container."""
    listing = commands.run(["chroot", tree, "/lib64/ld-linux-x86-64.so.2", "--list", "/usr/bin/crun"],
                           what="listing crun's libraries").decode()
    paths = [word for line in listing.splitlines() for word in line.split() if word.startswith("/")]
    with open(os.path.join(tree, "usr/lib/katashim/read-ahead"), "w") as file:
        file.write("".join(f"{path}\n" for path in sorted({"/usr/bin/crun", *paths})))


def _install_etc(tree):
    for name, text in {
            "etc/resolv.conf": "", "etc/hostname": "localhost\n",
            "etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost\n",
            "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
            "etc/group": "root:x:0:\nnogroup:x:65534:\n",
            "etc/machine-id": "", "etc/fstab": ""}.items():
        path = os.path.join(tree, name)
        _remove(path)
        with open(path, "w") as file:
            file.write(text)


def _link_busybox(tree):
    """Names of busybox's applets for the debug console, where no package has the name."""
    names = subprocess.run([os.path.join(tree, "bin/busybox"), "--list"], check=True, capture_output=True,
                           text=True)
    taken = {name for place in ("bin", "sbin", "usr/bin", "usr/sbin")
             for name in os.listdir(os.path.join(tree, place))}
    for name in names.stdout.split():
        if name not in taken and name not in ("init", "linuxrc", "reboot", "halt", "poweroff"):
            os.symlink("/bin/busybox", os.path.join(tree, "bin", name))


def _link_iptables(tree):
    """The names that Debian makes with update-alternatives, which has not run."""
    for family in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            os.symlink("xtables-nft-multi", os.path.join(tree, "usr/sbin", family + suffix))


def _remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
