"""A split virtqueue, seen from the device (VIRTIO 1.2, section 2.7).

The three areas are read and written through memoryviews cast to the field's width, so that each
index moves in one load or store. A descriptor is copied once and checked after, because the guest may
rewrite it at any moment.
"""

import _thread
import os
import struct

from katashim.drivers.vhost_user_vsock.memory import GuestFault

_DESCRIPTOR = struct.Struct("<QIHH")        # address, length, flags, next
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT = 1                           # in the available ring's flags

# Linux never puts more into an indirect table; without a bound, one chain could cost seconds.
MAX_INDIRECT = 1024
MAX_SIZE = 32768


class Vring:
    """One queue.

    :param name: for messages.
    :param writable: whether its descriptors are for the device to write (the receive queue) or to
        read (the transmit queue); any other one is a fault.
    :ivar live: it may be used: set up, enabled and not broken.
    """

    __slots__ = ("_available", "_descriptors", "_fence", "_flag", "_last", "_memory", "_next_used",
                 "_signalled", "_used", "_used_ring", "addresses", "base", "call_fd", "error_fd",
                 "event_idx", "kick_fd", "live", "name", "size")

    def __init__(self, name, writable):
        self.name = name
        self._flag = _WRITE if writable else 0
        self.kick_fd = self.call_fd = self.error_fd = -1
        self._fence = _thread.allocate_lock()
        self.reset()

    def reset(self):
        """Forget all that the driver set up; the fds stay."""
        self.live = False
        self.size, self.base, self.addresses = 0, 0, None
        self.event_idx = False
        self._last = 0
        self._unmap()

    def _unmap(self):
        self._memory = self._descriptors = self._available = self._used = self._used_ring = None

    def start(self, memory):
        """Map the ring in `memory` and begin where `base` says.

        :raises GuestFault: size or addresses are missing or impossible.
        """
        self._last = self.base
        self.remap(memory)
        self._next_used = self._used[1]
        self._signalled = None              # the first notification is never suppressed
        self.live = True

    def remap(self, memory):
        """Look the addresses up again, after a change of the memory map."""
        if not self.size or self.addresses is None:
            raise GuestFault(f"the {self.name} ring is started before its size and addresses are set")
        descriptors, used, available = self.addresses
        size = self.size
        self._descriptors = memory.user_view(descriptors, 16 * size)
        self._available = memory.user_view(available, 6 + 2 * size).cast("H")
        area = memory.user_view(used, 6 + 8 * size)
        self._used = area.cast("H")
        self._used_ring = area[4:4 + 8 * size].cast("I")
        self._memory = memory

    def stop(self):
        """Stop using the ring; returns the index of the next available entry, for the frontend."""
        self.base = self._last
        self.live = False
        self._unmap()
        return self._last

    def pop(self):
        """Take the next chain: ``(head, [memoryview])``, or None when there is none.

        :raises GuestFault: the ring is malformed.
        """
        if not self.live:
            return None
        available = self._available
        waiting = (available[1] - self._last) & 0xffff
        if not waiting:
            return None
        if waiting > self.size:
            raise GuestFault(f"the {self.name} ring offers {waiting} chains, its size is {self.size}")
        head = available[2 + (self._last & self.size - 1)]
        if head >= self.size:
            raise GuestFault(f"the {self.name} ring offers the descriptor {head} of {self.size}")
        views = self._walk(head)
        self._last = (self._last + 1) & 0xffff
        return head, views

    def unpop(self):
        """Give back the chain that `pop` returned last; the next `pop` returns it again."""
        self._last = (self._last - 1) & 0xffff

    def _walk(self, index):
        table, entries = self._descriptors, self.size
        left = entries                      # a chain without a loop is no longer than its table
        views = []
        while True:
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, index << 4)
            if flags & _INDIRECT:
                if table is not self._descriptors or flags & _NEXT:
                    raise GuestFault(f"the {self.name} ring nests an indirect table")
                table = self._indirect(address, length)
                entries = left = length >> 4
                index = 0
                continue
            if flags & _WRITE != self._flag:
                raise GuestFault(f"the {self.name} ring has a descriptor for the other direction")
            views += self._memory.views(address, length)
            if not flags & _NEXT:
                return views
            left -= 1
            if left <= 0 or following >= entries:
                raise GuestFault(f"the {self.name} ring has a chain that loops or leaves its table")
            index = following

    def _indirect(self, address, length):
        if length & 15 or not 0 < length >> 4 <= MAX_INDIRECT:
            raise GuestFault(f"the {self.name} ring has an indirect table of {length} bytes")
        views = self._memory.views(address, length)
        if len(views) == 1:
            return views[0]
        return memoryview(b"".join(views))  # across two regions; at most 16 KiB

    def push(self, head, written=0):
        """Give a chain back to the driver with `written` bytes in it."""
        slot = (self._next_used & self.size - 1) << 1
        self._used_ring[slot] = head
        self._used_ring[slot + 1] = written
        self._next_used = following = (self._next_used + 1) & 0xffff
        self._used[1] = following

    def arm(self):
        """Ask for a kick at the next available chain; returns True when one has come already."""
        if not self.live:
            return False
        if self.event_idx:
            self._used[2 + 4 * self.size] = self._last
            self._order_store_before_load()
        return self._available[1] != self._last

    def notify(self):
        """Interrupt the driver for what was pushed, unless it asked not to be."""
        if not self.live or self.call_fd < 0:
            return
        self._order_store_before_load()
        if self.event_idx:
            wanted = self._available[2 + self.size]
            before, now = self._signalled, self._next_used
            self._signalled = now
            if before is not None and (now - wanted - 1) & 0xffff >= (now - before) & 0xffff:
                return
        elif self._available[0] & _NO_INTERRUPT:
            return
        self.signal()

    def signal(self):
        """Interrupt the driver."""
        try:
            os.eventfd_write(self.call_fd, 1)
        except BlockingIOError:
            pass                            # the counter is full: it has been signalled

    def _order_store_before_load(self):
        # The only reordering x86 allows is a load before an earlier store to another place; the
        # locked instruction inside a lock's acquire forbids it.
        self._fence.acquire()
        self._fence.release()
