"""The vhost-user protocol with the frontend, QEMU (docs/interop/vhost-user.rst of QEMU).

One frontend at a time. Messages are read without blocking, since the data path shares the thread;
each is a header (request, flags, size) and a payload, with fds as ancillary data of the header.
"""

import os
import socket
import struct

from katashim.drivers.vhost_user_vsock.device import FEATURES
from katashim.drivers.vhost_user_vsock.loop import EPOLLIN
from katashim.drivers.vhost_user_vsock.memory import GuestFault, Region

_HEADER = struct.Struct("<III")
_U64 = struct.Struct("<Q")
_RING_STATE = struct.Struct("<II")
_RING_ADDRESSES = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<QQQQ")            # guest address, size, frontend address, offset in the file
_CONFIG = struct.Struct("<III")             # offset, size, flags

_VERSION, _IS_REPLY, _NEEDS_REPLY = 1, 4, 8
_MAX_PAYLOAD, _MAX_FDS = 4096, 64
_MAX_REGIONS = 128
_NO_FD = 1 << 8                             # in SET_VRING_KICK/CALL/ERR

# Protocol features.
_REPLY_ACK, _CONFIG_SPACE, _RESET_DEVICE, _MEM_SLOTS = 1 << 3, 1 << 9, 1 << 13, 1 << 15
_PROTOCOL_FEATURES = _REPLY_ACK | _CONFIG_SPACE | _RESET_DEVICE | _MEM_SLOTS


class Frontend:
    """Serves the frontend that connects to `listener`.

    :param loop: a Loop. :param device: a Device. :param listener: a non-blocking unix socket.
    :param linger_s: how long to wait for the frontend to come back before `gone` is called.
    :param gone: called without arguments. :param log: called with a line of text.
    """

    def __init__(self, loop, device, listener, linger_s, gone, log):
        self._loop, self._device, self._listener = loop, device, listener
        self._linger_s, self._gone, self._log = linger_s, gone, log
        self._sock = None
        self._visits = 0
        loop.watch(listener.fileno(), EPOLLIN, self._accept)

    def _accept(self, _events):
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        if self._sock is not None:
            self._log("a second frontend was refused")
            sock.close()
            return
        sock.setblocking(False)
        self._sock = sock
        self._visits += 1
        self._ack = False
        self._regions = {}                  # Region.key() -> Region
        self._expect_header()
        self._loop.watch(sock.fileno(), EPOLLIN, self._readable)

    def _expect_header(self):
        self._request, self._data, self._fds, self._missing = None, b"", [], _HEADER.size

    def _readable(self, _events):
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, self._missing, _MAX_FDS)
        except BlockingIOError:
            return
        except OSError as exc:
            return self._lost(exc.strerror)
        self._fds += fds
        if not data:
            return self._lost("it closed the connection")
        self._data += data
        self._missing -= len(data)
        if self._missing:
            return
        if self._request is None:
            self._request, self._flags, size = _HEADER.unpack(self._data)
            if size > _MAX_PAYLOAD or self._flags & 3 != _VERSION:
                return self._lost(f"a message with flags {self._flags:#x} and {size} bytes")
            self._data, self._missing = b"", size
            if size:
                return
        self._dispatch()

    def _dispatch(self):
        request, data, fds, needs_reply = self._request, self._data, self._fds, self._flags & _NEEDS_REPLY
        self._expect_header()
        try:
            reply, failed = None, 0
            handler = _HANDLERS.get(request)
            if handler is None:
                raise GuestFault("it is not supported")
            reply = handler(self, data, fds)
        except (GuestFault, struct.error) as exc:
            self._log(f"the frontend's request {request} failed: {exc}")
            failed = 1
        finally:
            for fd in fds:                  # those that the handler did not take
                os.close(fd)
        if reply is None and needs_reply and self._ack:
            reply = _U64.pack(failed)
        if reply is not None:
            try:
                self._sock.sendall(_HEADER.pack(request, _VERSION | _IS_REPLY, len(reply)) + reply)
            except OSError as exc:
                self._lost(exc.strerror)

    def _lost(self, why):
        """The frontend is gone; it may come back within the time to linger."""
        self._log(f"the frontend is gone: {why}")
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._loop.forget(self._sock.fileno())
        self._loop.close_later(self._sock)
        self._sock = None
        self._device.detach()
        self._loop.later(self._linger_s, self._give_up, self._visits)

    def _give_up(self, visits):
        if visits == self._visits:
            self._gone()

    # -- requests: (payload, fds) -> reply's payload or None ----------------------------------------
    def _get_features(self, data, fds):
        return _U64.pack(FEATURES)

    def _set_features(self, data, fds):
        self._device.set_features(_U64.unpack(data)[0])

    def _get_protocol_features(self, data, fds):
        return _U64.pack(_PROTOCOL_FEATURES)

    def _set_protocol_features(self, data, fds):
        self._ack = bool(_U64.unpack(data)[0] & _REPLY_ACK)

    def _nothing(self, data, fds):
        pass

    def _reset(self, data, fds):
        self._device.reset()

    def _set_mem_table(self, data, fds):
        count = struct.unpack_from("<I", data)[0]
        if count != len(fds) or len(data) < 8 + count * _REGION.size:
            raise GuestFault(f"a memory table of {count} regions with {len(fds)} fds")
        regions = {}
        for i, fd in enumerate(fds):
            region = _region(data, 8 + i * _REGION.size, fd)
            regions[region.key()] = region
        self._regions = regions
        self._device.set_memory(regions.values())

    def _get_max_mem_slots(self, data, fds):
        return _U64.pack(_MAX_REGIONS)

    def _add_mem_reg(self, data, fds):
        if len(fds) != 1 or len(self._regions) >= _MAX_REGIONS:
            raise GuestFault(f"a region more than {len(self._regions)} with {len(fds)} fds")
        region = _region(data, 8, fds[0])
        self._regions[region.key()] = region
        self._device.set_memory(self._regions.values())

    def _rem_mem_reg(self, data, fds):
        guest, size, user, _ = _REGION.unpack_from(data, 8)
        if self._regions.pop((guest, size, user), None) is None:
            raise GuestFault(f"there is no memory region at {guest:#x}")
        self._device.set_memory(self._regions.values())

    def _set_vring_num(self, data, fds):
        index, size = _RING_STATE.unpack(data)
        self._device.set_size(self._ring(index), size)

    def _set_vring_addr(self, data, fds):
        index, _, descriptors, used, available, _ = _RING_ADDRESSES.unpack(data)
        self._device.set_addresses(self._ring(index), descriptors, used, available)

    def _set_vring_base(self, data, fds):
        index, base = _RING_STATE.unpack(data)
        self._device.set_base(self._ring(index), base)

    def _get_vring_base(self, data, fds):
        index, _ = _RING_STATE.unpack(data)
        known = index < len(self._device.rings)
        return _RING_STATE.pack(index, self._device.stop_ring(index) if known else 0)

    def _set_vring_enable(self, data, fds):
        index, enabled = _RING_STATE.unpack(data)
        self._device.enable_ring(self._ring(index), bool(enabled))

    def _set_vring_kick(self, data, fds):
        index, fd = self._ring_fd(data, fds)
        if fd < 0:
            raise GuestFault("a ring without a kick fd would have to be polled")
        self._device.start_ring(index, fd)

    def _set_vring_call(self, data, fds):
        index, fd = self._ring_fd(data, fds)
        self._device.set_fd(index, "call_fd", fd)

    def _set_vring_err(self, data, fds):
        index, fd = self._ring_fd(data, fds)
        self._device.set_fd(index, "error_fd", fd)

    def _get_config(self, data, fds):
        offset, size, flags = _CONFIG.unpack_from(data)
        space = _U64.pack(self._device.cid)
        if offset + size > len(space):
            return b""                      # the protocol's way to refuse
        return _CONFIG.pack(offset, size, flags) + space[offset:offset + size]

    def _ring(self, index):
        if index >= len(self._device.rings):
            raise GuestFault(f"there is no ring {index}")
        return index

    def _ring_fd(self, data, fds):
        value = _U64.unpack(data)[0]
        index = self._ring(value & 0xff)
        return index, (-1 if value & _NO_FD or not fds else fds.pop(0))


def _region(data, at, fd):
    guest, size, user, offset = _REGION.unpack_from(data, at)
    return Region(guest, size, user, offset, fd)


_HANDLERS = {
    1: Frontend._get_features,
    2: Frontend._set_features,
    3: Frontend._nothing,                   # SET_OWNER
    4: Frontend._reset,                     # RESET_OWNER
    5: Frontend._set_mem_table,
    8: Frontend._set_vring_num,
    9: Frontend._set_vring_addr,
    10: Frontend._set_vring_base,
    11: Frontend._get_vring_base,
    12: Frontend._set_vring_kick,
    13: Frontend._set_vring_call,
    14: Frontend._set_vring_err,
    15: Frontend._get_protocol_features,
    16: Frontend._set_protocol_features,
    18: Frontend._set_vring_enable,
    24: Frontend._get_config,
    34: Frontend._reset,                    # RESET_DEVICE
    36: Frontend._get_max_mem_slots,
    37: Frontend._add_mem_reg,
    38: Frontend._rem_mem_reg,
}
