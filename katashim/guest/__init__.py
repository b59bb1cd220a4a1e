"""The reference guest: what builds its image, and the agent that runs inside it.

On the host (plain, standard library only):

    cli       ``katashim-ctl guest build`` and ``show``
    build     the whole: kernel, initrd, root image, manifest
    cache     layers that are kept between builds
    commands  programs of the host that the builder runs
    kernel    the kernel: from Debian's package, or from Debian's source with kernel.config
    rootfs    the read-only root: Debian packages plus the agent, as EROFS
    initrd    the small initial RAM disk that reaches the root image
    tables    the message tables of the agent, out of ttrpc/proto's descriptors

In the guest:

    wire      protobuf by table
    agent/    PID 1: the Kata agent's protocol over vsock, containers by crun

docs/guest.md tells the story.
"""
