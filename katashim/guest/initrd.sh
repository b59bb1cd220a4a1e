#!/bin/busybox sh
# The initial RAM disk of katashim's guest: load the modules that reach the root image, mount it,
# and hand over to its /sbin/init. Every process costs milliseconds in an emulated guest, so this
# uses the shell's own words where it can. Understands root=, rootfstype=, rootflags= and init=.

fail() {
    echo "katashim initrd: $*" >/dev/console
    cat /proc/partitions >/dev/console
    exec poweroff -f
}

mount -t proc proc /proc
mount -t devtmpfs dev /dev

# Modules that reach the usual root; one process for all of them. None for a kernel that has them built in.
read -r modules </modules
[ -z "$modules" ] || modprobe -a $modules

root=/dev/vda type=erofs flags=ro init=/sbin/init
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
        root=/dev/*) root=${word#root=} ;;
        rootfstype=*) type=${word#rootfstype=} ;;
        rootflags=*) flags=ro,${word#rootflags=} ;;
        init=*) init=${word#init=} ;;
    esac
done

# A root image that travels in the RAM disk itself (a host that has no image, only an initrd).
if [ -e /rootfs.img ]; then
    modprobe loop
    losetup -r /dev/loop0 /rootfs.img || fail "cannot attach /rootfs.img"
    root=/dev/loop0 type=erofs flags=ro
fi

tries=100
until [ -b "$root" ]; do
    [ $tries -lt 100 ] || modprobe -a virtio_pmem nvme 2>/dev/null
    case $root in
        # Our image has no partition table, but a host may be used to those that have one.
        /dev/vd[a-z]1 | /dev/pmem[0-9]p1) [ ! -b "${root%1}" ] || root=${root%1} ;;
    esac
    tries=$((tries - 1))
    [ $tries -gt 0 ] || fail "no root device $root"
    [ -b "$root" ] || sleep 0.05
done

# Programs are read in a few large pieces: each request costs a round through the emulator.
mount -t sysfs sys /sys
ahead=/sys/class/block/${root#/dev/}/queue/read_ahead_kb
[ ! -e "$ahead" ] || echo 4096 >"$ahead"

mount -t "$type" -o "$flags" "$root" /root || fail "cannot mount $root as $type"
exec switch_root /root "$init"
