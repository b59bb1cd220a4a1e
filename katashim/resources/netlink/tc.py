"""The kernel's traffic control, as far as joining two links needs it: bytes and records.

An ingress qdisc on a link and a filter that takes every packet and redirects it out of another link:
what ``tc filter add dev A parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect
dev B`` does. u32 and not matchall, because the kernels that users have all carry u32.

Structures of linux/rtnetlink.h (tcmsg), linux/pkt_cls.h (u32) and linux/tc_act/tc_mirred.h. Used by
katashim.resources.netlink.rtnetlink.
"""

import socket
import struct
from typing import NamedTuple

from katashim.resources.netlink import codec

ETH_P_ALL = 3

_TC_H_INGRESS = 0xFFFFFFF1          # where the qdisc hangs
_INGRESS_HANDLE = 0xFFFF0000        # "ffff:", its own name and the parent of its filters
_TCMSG = struct.Struct("=BxxxiIII")     # family, link index, handle, parent, info

_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_U32_SEL, _TCA_U32_ACT = 5, 7
_TCA_ACT_KIND, _TCA_ACT_OPTIONS, _TCA_ACT_STATS = 1, 2, 4
_TCA_MIRRED_PARMS = 2
_TCA_STATS_BASIC = 1
_TCA_EGRESS_REDIR = 1
_TC_ACT_STOLEN = 4
_TC_U32_TERMINAL = 1

_U32_SELECTOR = struct.Struct("=BBBxHHhhI")     # flags, offshift, nkeys, offmask, off, offoff, hoff, hmask
_U32_KEY = struct.Struct("=IIii")               # mask, value, offset, mask of the offset
_MIRRED = struct.Struct("=IIiiiiI")     # index, capab, verdict, refcnt, bindcnt, direction, link index
_STATS_BASIC = struct.Struct("=QI")             # bytes, packets


class Qdisc(NamedTuple):
    """A queueing discipline."""

    index: int              # of its link
    kind: str               # "ingress", "clsact", "noqueue", "fq_codel", ...
    handle: int
    parent: int

    @property
    def is_ingress(self):
        """Whether it sits where an ingress qdisc would (clsact takes the same place)."""
        return self.parent == _TC_H_INGRESS


class Redirect(NamedTuple):
    """A filter that sends what comes in at one link out of another."""

    index: int              # the link it comes in at
    target: int             # index of the link it goes out of; 0 when that link is gone
    protocol: int           # ETH_P_*
    packets: int = 0


def ingress(index):
    """Request payload that names the ingress qdisc of the link `index`."""
    return _TCMSG.pack(0, index, _INGRESS_HANDLE, _TC_H_INGRESS, 0) + codec.text(_TCA_KIND, "ingress")


def all_qdiscs():
    """Request payload for a dump of the qdiscs of all links."""
    return _TCMSG.pack(0, 0, 0, 0, 0)


def qdisc(payload):
    """An RTM_NEWQDISC message as a :class:`Qdisc`. :raises codec.Malformed: it is none."""
    _, index, handle, parent, _ = codec.unpack(_TCMSG, payload, "a qdisc message")
    values = dict(codec.attributes(payload, _TCMSG.size))
    return Qdisc(index, codec.as_text(values.get(_TCA_KIND, b"")), handle, parent)


def ingress_filters(index):
    """Request payload for a dump of the ingress filters of the link `index`."""
    return _TCMSG.pack(0, index, 0, _INGRESS_HANDLE, 0)


def redirect_all(index, target):
    """Request payload of the filter that redirects all that comes in at `index` out of `target`."""
    mirred = _MIRRED.pack(0, 0, _TC_ACT_STOLEN, 0, 0, _TCA_EGRESS_REDIR, target)
    action = codec.nested(
        1, codec.text(_TCA_ACT_KIND, "mirred"),
        codec.nested(_TCA_ACT_OPTIONS, codec.attribute(_TCA_MIRRED_PARMS, mirred)))
    # One key that compares nothing: it matches every packet.
    selector = (_U32_SELECTOR.pack(_TC_U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + _U32_KEY.pack(0, 0, 0, 0))
    info = socket.htons(ETH_P_ALL)      # the priority above it is left to the kernel
    return (_TCMSG.pack(0, index, 0, _INGRESS_HANDLE, info) + codec.text(_TCA_KIND, "u32")
            + codec.nested(_TCA_OPTIONS, codec.attribute(_TCA_U32_SEL, selector),
                           codec.nested(_TCA_U32_ACT, action)))


def redirects(payload):
    """The redirects in an RTM_NEWTFILTER message: list of :class:`Redirect`, empty for other filters.

    :raises codec.Malformed: it is no filter message.
    """
    _, index, _, _, info = codec.unpack(_TCMSG, payload, "a filter message")
    values = dict(codec.attributes(payload, _TCMSG.size))
    if codec.as_text(values.get(_TCA_KIND, b"")) != "u32":
        return []
    options = dict(codec.attributes(values.get(_TCA_OPTIONS, b"")))
    found = []
    for _, action in codec.attributes(options.get(_TCA_U32_ACT, b"")):
        target, packets = _mirred(dict(codec.attributes(action)))
        if target is not None:
            found.append(Redirect(index, target, socket.ntohs(info & 0xFFFF), packets))
    return found


def _mirred(action):
    """``(index of the link it redirects to, packets so far)``; ``(None, 0)`` for another action."""
    options = dict(codec.attributes(action.get(_TCA_ACT_OPTIONS, b"")))
    if codec.as_text(action.get(_TCA_ACT_KIND, b"")) != "mirred" or _TCA_MIRRED_PARMS not in options:
        return None, 0
    *_, direction, target = codec.unpack(_MIRRED, options[_TCA_MIRRED_PARMS], "a mirred action")
    if direction != _TCA_EGRESS_REDIR:
        return None, 0
    figures = dict(codec.attributes(action.get(_TCA_ACT_STATS, b"")))
    basic = figures.get(_TCA_STATS_BASIC)
    packets = codec.unpack(_STATS_BASIC, basic, "action figures")[1] if basic else 0
    return target, packets
