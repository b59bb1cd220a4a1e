"""The guest's memory, as the frontend shares it: mappings, and two kinds of address to look them up by.

Descriptors hold guest physical addresses; the rings themselves are given in the frontend's own
("user") addresses. Both come from outside, so every look-up checks the whole range, and what it
returns is a memoryview that cannot reach beyond it.
"""

import mmap
import os


class GuestFault(Exception):
    """The guest's driver (or the frontend) gave something that the specification forbids."""


class Region:
    """One contiguous piece of guest memory.

    :param guest: its first guest physical address. :param size: in bytes.
    :param user: its first address in the frontend. :param offset: where it begins in the file `fd`.
    :param fd: stays the caller's.
    :raises GuestFault: the file cannot be mapped as told.
    """

    __slots__ = ("guest", "size", "user", "view")

    def __init__(self, guest, size, user, offset, fd):
        if size == 0 or guest + size > 1 << 64 or user + size > 1 << 64:
            raise GuestFault(f"a memory region of {size} bytes at {guest:#x}")
        self.guest, self.size, self.user = guest, size, user
        start = offset & ~(mmap.ALLOCATIONGRANULARITY - 1)
        lead = offset - start
        try:
            # A mapping longer than its file would kill this process by SIGBUS later.
            if offset + size > os.fstat(fd).st_size:
                raise GuestFault(f"a memory region of {size} bytes at {offset} of a shorter file")
            mapping = mmap.mmap(fd, lead + size, mmap.MAP_SHARED,
                                mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
        except (OSError, ValueError, OverflowError) as exc:
            raise GuestFault(f"a memory region of {size} bytes cannot be mapped: {exc}") from exc
        self.view = memoryview(mapping)[lead:lead + size]

    def key(self):
        """What tells this region from others in the protocol's messages."""
        return self.guest, self.size, self.user


class GuestMemory:
    """All regions of one guest. Immutable: a change of the memory map makes a new one."""

    __slots__ = ("_recent", "regions")

    def __init__(self, regions=()):
        self.regions = tuple(regions)
        self._recent = self.regions[0] if self.regions else None

    def user_view(self, address, length):
        """The bytes at a frontend address, which must lie within one region.

        :raises GuestFault: they do not.
        """
        for region in self.regions:
            offset = address - region.user
            if 0 <= offset and offset + length <= region.size:
                return region.view[offset:offset + length]
        raise GuestFault(f"a ring at {address:#x} lies outside the guest's memory")

    def views(self, address, length):
        """The bytes at a guest physical address, as a list of views: one, or more across regions.

        :raises GuestFault: a part of the range is not the guest's memory.
        """
        region = self._recent
        if region is not None:
            offset = address - region.guest
            if 0 <= offset and offset + length <= region.size:
                return [region.view[offset:offset + length]]
        found = []
        while length > 0:
            region = self._region_of(address)
            offset = address - region.guest
            part = min(length, region.size - offset)
            found.append(region.view[offset:offset + part])
            address += part
            length -= part
        return found

    def _region_of(self, address):
        for region in self.regions:
            if region.guest <= address < region.guest + region.size:
                self._recent = region
                return region
        raise GuestFault(f"the address {address:#x} lies outside the guest's memory")
