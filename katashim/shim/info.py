"""``-info``: what this runtime is, asked by containerd 2.0 and later before its first container."""

from katashim import VERSION
from katashim.shim import wire

# Types of mounts in CreateTaskRequest.rootfs that containerd's mount manager shall hand over as they
# are instead of mounting them: images that become block devices of the VM (katashim.resources.rootfs).
ALLOWED_MOUNTS = ("erofs",)


def runtime_info(name):
    """A ``containerd.types.RuntimeInfo`` as bytes, for the runtime called `name`."""
    allowed = wire.text(1, "containerd.io/runtime-allow-mounts") + wire.text(2, ",".join(ALLOWED_MOUNTS))
    return wire.text(1, name) + wire.text(2, wire.text(1, VERSION)) + wire.text(5, allowed)
