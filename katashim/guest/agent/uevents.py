"""The kernel's news of devices (netlink(7), NETLINK_KOBJECT_UEVENT), and waiting for a device to be there.

A device that was plugged may be there before anybody asked or come later, so whoever wants one looks
for it in sysfs, and looks again after every event until it is found or time is up. Events also load
drivers and bring new memory online, which udev would do elsewhere. Called by main.py, devices.py.
"""

import os
import threading
import time
from _socket import SOCK_CLOEXEC, SOCK_RAW, socket

from katashim.guest.agent import log, modules
from katashim.guest.agent.rpcerror import INTERNAL, RpcError

_AF_NETLINK, _KOBJECT_UEVENT, _KERNEL_GROUP = 16, 15, 1
_LOOK_AGAIN_S = 0.25        # without any event: a device node may follow its event

_heard = threading.Condition()      # notified after each event


def start():
    """Listen, from a thread."""
    listener = socket(_AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, _KOBJECT_UEVENT)
    listener.bind((0, _KERNEL_GROUP))
    threading.Thread(target=_listen, args=(listener,), name="uevents", daemon=True).start()


def wait_for(find, timeout_s, what):
    """Call `find` until it returns something other than None, at each event; returns that.

    :param what: what is waited for, for the error. :raises RpcError: it is not there after `timeout_s`.
    """
    limit = time.monotonic() + timeout_s
    with _heard:
        while True:
            found = find()
            if found is not None:
                return found
            left = limit - time.monotonic()
            if left <= 0:
                raise RpcError(INTERNAL, f"Timeout after {timeout_s:g}s waiting for {what}")
            _heard.wait(min(left, _LOOK_AGAIN_S))


def parse(data):
    """The variables of an event's bytes (``ACTION=add\\0DEVPATH=...``) as a dict; {} for other messages."""
    head, *lines = data.rstrip(b"\0").split(b"\0")
    if b"@" not in head:
        return {}
    return dict(line.decode(errors="replace").partition("=")[::2] for line in lines)


def _listen(listener):
    while True:
        try:
            event = parse(listener.recv(65536))
        except OSError as exc:      # ENOBUFS: events were lost; whoever waits looks for itself
            log.warning("uevents", f"{exc}")
            event = {}
        try:
            _act(event)
        except Exception:  # noqa: BLE001  the next event may be the one that somebody waits for
            log.unforeseen("uevents", f"event {event}")
        with _heard:
            _heard.notify_all()


def _act(event):
    if event.get("ACTION") != "add":
        return
    if event.get("SUBSYSTEM") == "memory":
        online_memory(f"/sys{event['DEVPATH']}")
    elif event.get("MODALIAS") and "DRIVER" not in event and not _is_virtio_pci(event):
        modules.load_alias(event["MODALIAS"])


def _is_virtio_pci(event):
    return event["MODALIAS"].startswith("pci:v00001AF4")     # its driver reached our own disk


def online_memory(directory):
    """Bring one memory block online (``/sys/devices/system/memory/memoryN``)."""
    try:
        with open(os.path.join(directory, "online"), "r+") as file:
            if file.read().strip() == "0":
                file.seek(0)
                file.write("1")
    except OSError as exc:
        log.warning("uevents", f"{directory} does not come online: {exc}")
