"""The device behind the frontend's messages: the guest's memory, two rings, and the muxer on them."""

import os

from katashim.drivers.vhost_user_vsock.loop import EPOLLIN
from katashim.drivers.vhost_user_vsock.memory import GuestFault, GuestMemory
from katashim.drivers.vhost_user_vsock.muxer import Muxer
from katashim.drivers.vhost_user_vsock.vring import MAX_SIZE, Vring

VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC = 1 << 32, 1 << 30, 1 << 29, 1 << 28
FEATURES = VERSION_1 | PROTOCOL_FEATURES | EVENT_IDX | INDIRECT_DESC

RECEIVE, TRANSMIT = 0, 1        # the queues' numbers; the event queue (2) stays with the frontend


class Device:
    """A virtio-vsock device for the guest `cid`.

    :param loop: a Loop. :param listener/uds_path: see Muxer. :param log: called with a line of text.
    """

    def __init__(self, loop, cid, listener, uds_path, log):
        self._loop, self._log = loop, log
        self.cid = cid
        self.memory = GuestMemory()
        self.rings = (Vring("receive", writable=True), Vring("transmit", writable=False))
        self._started = [False, False]
        self._enabled = [True, True]
        self._stopped_at = {}           # ring index -> (base, addresses) when it was last stopped
        self.muxer = Muxer(loop, cid, listener, uds_path, *self.rings, self._broken, log)
        self._wake = (self.muxer.receive_ready, self.muxer.transmit_ready)

    def reset(self):
        """The frontend is gone, or resets the device: forget everything but the fds of the rings."""
        for index, ring in enumerate(self.rings):
            self._unwatch(index)
            ring.reset()
            self._started[index] = False
            self._enabled[index] = True
        self._stopped_at.clear()
        self.muxer.close_all("the device was reset")

    def detach(self):
        """The frontend is gone: let go of its memory and its fds."""
        self.reset()
        for index in range(len(self.rings)):
            self.set_fd(index, "kick_fd", -1)
            self.set_fd(index, "call_fd", -1)
            self.set_fd(index, "error_fd", -1)
        self.memory = GuestMemory()

    # -- what the frontend sets -------------------------------------------------------------------
    def set_features(self, features):
        """:raises GuestFault: the driver wants what was not offered."""
        if features & ~FEATURES:
            raise GuestFault(f"the features {features & ~FEATURES:#x} were not offered")
        for ring in self.rings:
            ring.event_idx = bool(features & EVENT_IDX)

    def set_memory(self, regions):
        """Use another memory map; rings in use are looked up in it anew."""
        self.memory = GuestMemory(regions)
        for index, ring in enumerate(self.rings):
            if self._started[index]:
                try:
                    ring.remap(self.memory)
                except GuestFault as fault:
                    self._broken(ring, fault)

    def set_size(self, index, size):
        """:raises GuestFault: no power of two, or too large."""
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise GuestFault(f"a ring of {size} entries")
        self._setting(index).size = size

    def set_addresses(self, index, descriptors, used, available):
        """Frontend addresses of the three areas; a ring in use moves there at once."""
        ring = self.rings[index]
        ring.addresses = descriptors, used, available
        if self._started[index]:
            ring.remap(self.memory)

    def set_base(self, index, base):
        """The index of the next available entry."""
        self._setting(index).base = base & 0xffff

    def set_fd(self, index, name, fd):
        """Exchange ``call_fd``, ``error_fd`` or ``kick_fd``; -1 for none. The old one is closed."""
        ring = self.rings[index]
        old = getattr(ring, name)
        if old >= 0:
            os.close(old)
        setattr(ring, name, fd)
        if name == "call_fd" and fd >= 0 and self._started[index]:
            ring.signal()               # an interrupt may have been lost with the old one

    def start_ring(self, index, kick_fd):
        """Begin to serve a ring. :raises GuestFault: it is not set up rightly."""
        self.stop_ring(index)
        ring = self.rings[index]
        self.set_fd(index, "kick_fd", kick_fd)
        ring.start(self.memory)
        self._started[index] = True
        ring.live = self._enabled[index]
        before = self._stopped_at.pop(index, None)
        if before is not None and before != (ring.base, ring.addresses):
            # A paused VM goes on where it stopped. Another place is another driver, after a reboot.
            self._stopped_at.clear()
            self.muxer.close_all("the guest's driver began anew")
        os.set_blocking(kick_fd, False)
        self._loop.watch(kick_fd, EPOLLIN, lambda _events: self._kicked(index))
        self._loop.soon(self.muxer.wake)

    def stop_ring(self, index):
        """Stop serving a ring; returns the index of its next available entry."""
        ring = self.rings[index]
        if not self._started[index]:
            return ring.base
        self._unwatch(index)
        self._started[index] = False
        base = ring.stop()
        self._stopped_at[index] = (base, ring.addresses)
        return base

    def enable_ring(self, index, enabled):
        """Frontends before QEMU 7.2 never enable the rings, so only a disabled one rests."""
        self._enabled[index] = enabled
        if self._started[index]:
            self.rings[index].live = enabled
            self._loop.soon(self.muxer.wake)

    def _setting(self, index):
        if self._started[index]:
            raise GuestFault(f"the {self.rings[index].name} ring is changed while it is in use")
        return self.rings[index]

    # -- events -----------------------------------------------------------------------------------
    def _kicked(self, index):
        try:
            os.eventfd_read(self.rings[index].kick_fd)
        except BlockingIOError:
            return
        self._wake[index]()

    def _unwatch(self, index):
        if self.rings[index].kick_fd >= 0:
            self._loop.forget(self.rings[index].kick_fd)

    def _broken(self, ring, fault):
        """Shut a malformed ring until the frontend sets it up anew."""
        self._log(f"{fault}; the ring is shut")
        index = self.rings.index(ring)
        self._unwatch(index)
        self._started[index] = False
        ring.stop()
        if ring.error_fd >= 0:
            os.eventfd_write(ring.error_fd, 1)
        self.muxer.close_all("a ring is broken")
