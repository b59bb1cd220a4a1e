"""The kernel's network configuration by rtnetlink, without a library and without programs.

    with Rtnetlink("/run/netns/x") as kernel:
        for link in kernel.links(): ...

Plain: no gevent, no greenlet switch, every exchange bounded. It has its own codec because the known
library (pyroute2) rests on asyncio, which does not live together with gevent, and costs more at
import than the shim may take to start.
"""

from katashim.resources.netlink.codec import Malformed
from katashim.resources.netlink.connection import NetlinkError
from katashim.resources.netlink.records import (
    IFF_LOOPBACK,
    IFF_NOARP,
    IFF_UP,
    NUD_PERMANENT,
    RT_TABLE_MAIN,
    RTM_F_CLONED,
    RTN_UNICAST,
    RTPROT_KERNEL,
    Address,
    Link,
    Neighbour,
    Route,
)
from katashim.resources.netlink.rtnetlink import Rtnetlink, delete_ingress, delete_link
from katashim.resources.netlink.tap import close_all, open_tap
from katashim.resources.netlink.tc import Qdisc, Redirect

__all__ = [
    "IFF_LOOPBACK", "IFF_NOARP", "IFF_UP", "NUD_PERMANENT", "RTM_F_CLONED", "RTN_UNICAST", "RTPROT_KERNEL",
    "RT_TABLE_MAIN", "Address", "Link", "Malformed", "Neighbour", "NetlinkError", "Qdisc", "Redirect",
    "Route", "Rtnetlink", "close_all", "delete_ingress", "delete_link", "open_tap",
]
