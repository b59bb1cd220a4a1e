"""katashim: a containerd shim v2 that runs each pod in a virtual machine of its own.

The layers, top down (imports point down only; test/test_architecture.py keeps it true)::

    6  shim, debug, ctl     what people and containerd execute
    5  services             what containerd calls over ttRPC (translation only)
    4  runtime              sandbox, container, process, stdio
    3  resources            network, shared filesystem, rootfs, volumes, cgroups
    2  drivers, agent       one VMM, one channel, one owner; the guest over vsock
    1  ttrpc, config, state, host, undo, resources.netlink
    0  errors, log, green, child, timeline

docs/architecture.md tells the story with two pictures.
"""

VERSION = "0.1.0"
