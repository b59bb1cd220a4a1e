"""Other versions of the real components: trees of newer Debian releases, and programs run inside them.

    trixie (Debian 13)   containerd 1.7, QEMU 10, the Rust virtiofsd, Python 3.13
    forky (testing)      containerd 2.x, a newer QEMU, vhost-device-vsock, a newer Python

A tree is made once by mmdebstrap and kept in /var/cache/katashim/trees. What runs inside sees the tree
as its root, with this repository at its usual place, the guest image of the host, a virtual
environment of the tree's own Python, and an empty /run; it has PID and mount namespaces of its own, so
that nothing of it can outlive it. For ``make test-matrix``.
"""

import fcntl
import os
import shutil
import subprocess

from harness.containerd import REPOSITORY

DIRECTORY = "/var/cache/katashim/trees"
_BUILD_S = 900

_PACKAGES = (
    "containerd", "runc", "qemu-system-x86", "virtiofsd", "iproute2", "kmod", "ca-certificates", "python3",
    "python3-venv", "python3-dev", "gcc", "libc6-dev", "mmdebstrap", "erofs-utils", "e2fsprogs", "lz4", "zstd",
    "busybox-static", "util-linux", "mount", "procps")
_MORE = {"trixie": (), "forky": ("vhost-device-vsock",)}
# testing's release file is signed for a week only, and a mirror may lag.
_OPTIONS = {"trixie": (), "forky": ('--aptopt=Acquire::Check-Valid-Until "false"',)}

# How downloads work here: name servers, certificates, pip's settings.
_NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
_NETWORK_ENV = ("PIP_CERT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "http_proxy", "https_proxy", "no_proxy")

_ENTER = """
set -eu
tree=$1 repository=$2 environment=$3
shift 3
mount --bind "$tree" "$tree"
mount -t proc proc "$tree/proc"
mount --rbind /sys "$tree/sys"
mount --rbind /dev "$tree/dev"
mount -t tmpfs -o mode=755 none "$tree/run"
mkdir -p "$tree$repository" "$repository/.venv" "$environment" "$tree/var/lib/katashim"
mount --bind "$repository" "$tree$repository"
mount --bind "$environment" "$tree$repository/.venv"
mount --bind -o ro /var/lib/katashim "$tree/var/lib/katashim"
exec chroot "$tree" "$@"
"""


def build(suite):
    """Make the tree of a Debian suite, if it is not there; returns its path.

    :raises subprocess.CalledProcessError: mmdebstrap failed; `stderr` has its words.
    """
    os.makedirs(DIRECTORY, exist_ok=True)
    path = os.path.join(DIRECTORY, suite)
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(path):
            return path
        fresh = path + ".new"
        shutil.rmtree(fresh, ignore_errors=True)        # of a build that was interrupted
        subprocess.run(
            ["mmdebstrap", "--variant=minbase", *_OPTIONS[suite],
             "--include=" + ",".join((*_PACKAGES, *_MORE[suite])), suite, fresh],
            check=True, capture_output=True, text=True, timeout=_BUILD_S)
        os.rename(fresh, path)
    return path


def run(suite, *argv, timeout_s, env=None):
    """Run a program inside the tree of `suite`, in the repository's directory, to its end.

    :param argv: the program and its arguments. :param env: its environment, beside PATH and HOME.
    :returns: subprocess.CompletedProcess with text; stderr is in stdout.
    :raises subprocess.TimeoutExpired: it and all that it started have been killed.
    """
    tree = build(suite)
    for path in _NETWORK_FILES:
        if os.path.exists(path):
            shutil.copy(path, tree + path)
    inner = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8",
             **{name: os.environ[name] for name in _NETWORK_ENV if name in os.environ}, **(env or {})}
    enter = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
             "sh", "-c", _ENTER, "enter", tree, REPOSITORY, f"{tree}-venv",
             "env", "-i", *(f"{name}={value}" for name, value in inner.items()),
             "sh", "-c", 'cd "$1" && shift && exec "$@"', "run", REPOSITORY]
    return subprocess.run([*enter, *argv], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          stdin=subprocess.DEVNULL, timeout=timeout_s, check=False)
