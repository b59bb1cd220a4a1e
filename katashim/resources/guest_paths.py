"""Where things are in the guest: the paths that host and agent agree on (Kata's layout)."""

SHARED = "/run/kata-containers/shared/containers/"      # the virtio-fs mount; CopyFile writes below it
PASSTHROUGH = SHARED + "passthrough/"                   # what the host's `rw/passthrough` shows

# On the guest's own /run, so that a mount point can be made whether there is a share or not. Never
# below /run/kata-containers/<container id>/: the agent empties that one recursively while the
# container's storages are still mounted.
SHM = "/run/kata-containers/sandbox/shm"
EPHEMERAL = "/run/kata-containers/sandbox/ephemeral/"
STORAGE = "/run/kata-containers/sandbox/storage/"
LAYERS = "/run/kata-containers/sandbox/layers/"


def rootfs(container_id):
    """The root filesystem of a container, shared or mounted from a disk."""
    return f"{PASSTHROUGH}{container_id}/rootfs"
