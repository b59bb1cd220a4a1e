"""What this machine holds of containers and virtual machines, to be compared before and after.

    before = leaks.snapshot()
    ...
    leaks.check(before)         # raises LeakError that names each thing that stayed

containerd and the kernel clean up after they have answered, so the comparison is repeated until it is
clean or its deadline is over. A snapshot sees the whole machine. Where other people work on it at the
same time, `scope` narrows it to things whose name has one of some words in it.
"""

import json
import os
import re
import subprocess
import time
from typing import NamedTuple

_DEADLINE_S = 10

# Programs that a sandbox starts, by their command line.
_PROGRAMS = re.compile(
    r"(^|/)(qemu-system-\S+|virtiofsd|containerd-shim\S*|vhost-device-vsock|cloud-hypervisor|firecracker"
    r"|runc|crun)(\x00|$)|vhost_user_vsock/__main__\.py|katashim/\S+\.py")
_DIRECTORIES = ("/run/kata", "/run/kata-containers", "/run/vc", "/run/containerd/s",
                "/run/containerd/fifo", "/run/netns", "/var/run/netns")
_NAMED = re.compile(r"kata-vsock-.*")       # below /run itself
# Groups of the machine's own services come and go by themselves.
_SERVICE = re.compile(r"\.(service|scope|slice|mount|socket)(/|$)")
_OURS = re.compile(r"kata|containerd|ctr")
# Places that the first container makes and no container removes: what containerd and runc have for a
# namespace of containers, and the well-known directory of Kata's shared filesystems.
_PLACE = re.compile(r"((/[^/]+)?|.*/io\.containerd\.runtime\.v2\.task)/(default|k8s\.io|moby)"
                    r"|/run/kata-containers/shared(/sandboxes)?")


class LeakError(AssertionError):
    """Something stayed; the message has one line for each thing."""


class Snapshot(NamedTuple):
    """Names of things by kind, ``{"process": {"pid 7: qemu-system-x86_64 ...", ...}, ...}``.

    `scope`, `directories` and `netns` are what it was taken with, for the second one.
    """

    things: dict
    scope: tuple
    directories: tuple
    netns: tuple


def snapshot(*, scope=(), directories=(), netns=()):
    """Look at the machine.

    :param scope: words; only things with one of them in their name count. () = everything counts.
    :param directories: more directories whose contents count, such as a containerd's state; one that
        does not exist is empty.
    :param netns: paths of network namespaces whose links and queueing disciplines count too.
    """
    things = {
        "process": _processes(scope),
        "mount": _mounts(),
        "file": _files((*_DIRECTORIES, *directories)),
        "cgroup": _cgroups(),
        "loop device": _loops(),
    }
    if scope:
        things = {kind: {thing for thing in found if any(word in thing for word in scope)}
                  for kind, found in things.items()}
    # Links have names like tap0_kata; in a shared root namespace nobody can tell whose they are.
    places = tuple(netns) if scope else ("", *netns)
    things["link"] = {link for place in places for link in _links(place)}
    things["qdisc or filter"] = {entry for place in places for entry in _traffic_control(place)}
    return Snapshot(things, tuple(scope), tuple(directories), tuple(netns))


def compare(before, after=None):
    """What is in `after` (or there now) and not in `before`: ``["mount /x", ...]``, sorted."""
    if after is None:
        netns = [path for path in before.netns if os.path.exists(path)]
        after = snapshot(scope=before.scope, directories=before.directories, netns=netns)
    return sorted(f"{kind} {thing}" for kind, found in after.things.items()
                  for thing in found - before.things.get(kind, set()))


def wait_clean(before, deadline_s=_DEADLINE_S):
    """Compare until nothing is left, at most `deadline_s` seconds; returns what stayed."""
    end = time.monotonic() + deadline_s
    while (left := compare(before)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def check(before, deadline_s=_DEADLINE_S):
    """:raises LeakError: something stayed for `deadline_s` seconds."""
    left = wait_clean(before, deadline_s)
    if left:
        raise LeakError(f"{len(left)} things are left {deadline_s:g} s after the end:\n  "
                        + "\n  ".join(left))


def open_fds(pid):
    """What the process `pid` has open, sorted: ["pipe", "socket", "/dev/null", ...], without numbers that
    change from run to run."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue                    # closed meanwhile
        found.append(re.sub(r":\[\d+\]$", "", target))
    return sorted(found)


# -- the kinds ------------------------------------------------------------------------------------
def _processes(scope):
    found = set()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                cmdline = file.read().decode(errors="replace")
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        interesting = any(word in cmdline for word in scope) if scope else _PROGRAMS.search(cmdline)
        if interesting and fields[0] != b"Z":
            # Field 22, the start time, tells a process from a later one with its number.
            found.add(f"{name} (started at tick {int(fields[19])}): "
                      + cmdline.replace("\0", " ").strip()[:300])
    return found


def _mounts():
    with open("/proc/self/mountinfo") as table:
        lines = [line.split(" - ") for line in table]
    found, counts = set(), {}
    for left, right in lines:
        place, kind = left.split()[4], right.split()[0]
        counts[place] = counts.get(place, 0) + 1        # mounts on top of one another
        found.add(f"{place} ({kind})" + (f" number {counts[place]}" if counts[place] > 1 else ""))
    return found


def _files(directories):
    found = {f"/run/{name}" for name in os.listdir("/run") if _NAMED.fullmatch(name)}
    for top in {os.path.realpath(directory) for directory in directories}:
        for place, below, files in os.walk(top):
            found.update(os.path.join(place, name) for name in (*below, *files))
    return {path for path in found if not _PLACE.fullmatch(path)}


def _cgroups():
    found = set()
    for place, _, _ in os.walk("/sys/fs/cgroup"):
        path = place[len("/sys/fs/cgroup"):]
        if not _PLACE.fullmatch(path) and (not _SERVICE.search(path) or _OURS.search(path)):
            found.add(path)
    return found


def _loops():
    found = set()
    for name in os.listdir("/sys/block"):
        if name.startswith("loop"):
            try:
                with open(f"/sys/block/{name}/loop/backing_file") as file:
                    found.add(f"{name}: {file.read().strip()}")
            except (FileNotFoundError, NotADirectoryError):
                pass                    # nothing is behind it
    return found


def _links(netns):
    return {f"{link['ifname']} of type {link.get('linkinfo', {}).get('info_kind', link['link_type'])}"
            + (f" in {netns}" if netns else "")
            for link in _ip_json(netns, "ip", "-j", "-d", "link", "show")}


def _traffic_control(netns):
    where = f" in {netns}" if netns else ""
    found = set()
    for entry in _ip_json(netns, "tc", "-j", "qdisc", "show"):
        # The kernel gives every link a default one, in kinds that depend on its configuration.
        if entry["kind"] in ("ingress", "clsact"):
            found.add(f"{entry['kind']} on {entry['dev']}{where}")
    return found


def _ip_json(netns, *argv):
    enter = ["nsenter", f"--net={netns}"] if netns else []
    text = subprocess.run([*enter, *argv], check=True, capture_output=True, text=True, timeout=10).stdout
    return json.loads(text or "[]")
