#!/bin/sh
# Make this machine ready: `setup.sh run` for the demo, `setup.sh develop` for the tests too. Parts of it:
# `setup.sh packages` (Debian's only) and `setup.sh environment` (all but the guest image).
# Debian packages that are missing, the virtual environment .venv, the guest image. Says what it does;
# what is there already is used, so the second run takes seconds. Called by the Makefile.
set -eu

cd "$(dirname "$0")/../.."
mode=${1:-run}

# containerd, runc: what runs us.  qemu, virtiofsd: the virtual machine.  python3-dev, gcc: netifaces is
# built from source.  mmdebstrap, erofs-utils, ...: the guest image.  busybox-static: the demo's container.
packages="containerd runc qemu-system-x86 iproute2 kmod ca-certificates
    python3 python3-venv python3-dev gcc libc6-dev
    mmdebstrap erofs-utils e2fsprogs lz4 zstd busybox-static"
develop_packages="crun iputils-ping procps util-linux mount make"

say() { printf '==> %s\n' "$*"; }

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

installed() { dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

install_packages() {
    missing=
    for package in $packages; do
        installed "$package" || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    [ "$(id -u)" = 0 ] || die "needs root to install:$missing"
    say "installing Debian packages:$missing"
    export DEBIAN_FRONTEND=noninteractive
    # The package lists of a fresh image are often empty, and old ones name files that are gone.
    apt-get update
    # shellcheck disable=SC2086
    apt-get install -y --no-install-recommends $missing
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    for python in "${PYTHON:-}" /usr/bin/python3 "$(command -v python3 || true)"; do
        if [ -n "$python" ] && is_new_enough "$python"; then
            return 0
        fi
    done
    die "needs Python 3.11 or newer; name one: PYTHON=/path/to/python3 make"
}

make_environment() {
    requirements=requirements.txt
    [ "$mode" != develop ] || requirements=requirements-dev.txt
    find_python
    # What the environment was made from. The one for development serves to run, too.
    recipe="$("$python" --version) $(cat requirements.txt | sha256sum)"
    developing="$recipe $(cat requirements-dev.txt | sha256sum)"
    wanted=$recipe
    [ "$mode" != develop ] || wanted=$developing
    made=$(cat .venv/katashim-recipe 2>/dev/null || true)
    if [ "$made" = "$wanted" ] || [ "$made" = "$developing" ]; then
        return 0
    fi
    if ! is_new_enough .venv/bin/python; then
        say "making the virtual environment .venv with $("$python" --version)"
        "$python" -m venv --clear .venv
    fi
    say "installing the Python packages of $requirements"
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -r "$requirements"
    printf '%s\n' "$wanted" > .venv/katashim-recipe
}

make_guest() {
    bin/katashim-ctl guest build
}

case $mode in
    run|packages|environment) ;;
    develop) packages="$packages $develop_packages" ;;
    *) die "the mode is run, develop, packages or environment, not $mode" ;;
esac
if command -v dpkg-query >/dev/null; then
    # Debian 12 has QEMU's virtiofsd in qemu-system-common; later it is a package of its own.
    . /etc/os-release
    case ${VERSION_ID:-} in
        12|11) ;;
        *) packages="$packages virtiofsd" ;;
    esac
    install_packages
else
    say "no Debian here: make sure that these are installed: $packages"
fi
[ "$mode" != packages ] || exit 0
make_environment
[ "$mode" != environment ] || exit 0
make_guest
