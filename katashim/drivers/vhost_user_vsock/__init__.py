"""A virtio-vsock device for QEMU as a process of its own, in nothing but the standard library.

It is used where the host kernel has no vhost-vsock and no vhost-device-vsock is installed; see
katashim/drivers/vsock.py, which starts it. One process serves one VM::

    QEMU --- vhost-user socket (frontend.py) --- device.py --- muxer.py --- hybrid vsock unix socket
             guest memory (memory.py), rings (vring.py), packets (packet.py)

The host's side is the hybrid vsock that Firecracker and Cloud Hypervisor made common: to reach the
guest's port P, connect to the unix socket, send ``CONNECT P\\n``, read ``OK <host port>\\n``; when the
guest connects to CID 2 port P, the process connects to ``<unix socket>_P``.

The guest is not trusted. Whatever stands in its memory, this process neither crashes nor spins nor
touches a byte outside the guest's memory: a broken ring is shut until the driver sets it up anew, a
broken connection is reset. QEMU is trusted as far as it could harm itself anyway.

Specifications: the vhost-user protocol (QEMU docs/interop/vhost-user.rst), VIRTIO 1.2 sections 2.7
(split virtqueues) and 5.10 (socket device).

Memory ordering: CPython has no fences, so this relies on x86's order of loads and stores, and on a
lock's atomic instruction where a store must come before a load (vring.py). It refuses to run elsewhere.
"""
