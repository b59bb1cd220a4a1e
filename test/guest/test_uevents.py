"""The kernel's device events, and waiting for what they announce."""

import threading

import pytest

from katashim.guest.agent import uevents
from katashim.guest.agent.rpcerror import RpcError


def test_an_event_is_its_variables():
    data = b"add@/devices/x\0ACTION=add\0DEVPATH=/devices/x\0SUBSYSTEM=block\0DEVNAME=vda\0"
    assert uevents.parse(data) == {"ACTION": "add", "DEVPATH": "/devices/x", "SUBSYSTEM": "block",
                                   "DEVNAME": "vda"}


def test_udevs_own_messages_are_none():
    assert uevents.parse(b"libudev\0\xfe\xed\xca\xfe") == {}


def test_waiting_ends_with_what_is_found(monkeypatch):
    monkeypatch.setattr(uevents, "_LOOK_AGAIN_S", 0.001)
    found = iter([None, None, "vdb"])
    assert uevents.wait_for(lambda: next(found), 5, "a disk") == "vdb"


def test_an_event_makes_the_waiting_look_again(monkeypatch):
    monkeypatch.setattr(uevents, "_LOOK_AGAIN_S", 60)
    looked, there = threading.Event(), []

    def find():
        looked.set()
        return there[0] if there else None

    def announce():
        looked.wait(5)
        there.append("vdb")
        with uevents._heard:
            uevents._heard.notify_all()

    thread = threading.Thread(target=announce)
    thread.start()
    assert uevents.wait_for(find, 30, "a disk") == "vdb"
    thread.join()


def test_waiting_in_vain_names_the_thing():
    with pytest.raises(RpcError, match=r"Timeout after 0.01s waiting for a disk"):
        uevents.wait_for(lambda: None, 0.01, "a disk")
