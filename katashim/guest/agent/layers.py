"""A root filesystem of several disk images: one writable ext4, EROFS below it, an overlay of all.

runtime-rs sends it as a group of storages in one CreateContainer (driver ``erofs.multi-layer``, or option
``X-kata.multi-layer=true``). Options: ``X-kata.overlay-upper`` or ``-lower`` says what an image is,
``X-kata.mkdir.path=PATH`` makes a directory first, where ``{{ mount 0 }}`` stands for the upper image
and ``{{ mount 1 }}`` for the first lower one, ``X-kata.gpt-partitioned=true`` and
``X-kata.partition-number=N``
pick a partition. Called by storage.py.
"""

import os

from katashim.guest.agent import devices, mounts
from katashim.guest.agent.rpcerror import INTERNAL, INVALID_ARGUMENT, RpcError

DRIVER = "erofs.multi-layer"
_MEMBER, _UPPER, _LOWER = "X-kata.multi-layer=true", "X-kata.overlay-upper", "X-kata.overlay-lower"
_MAKE_DIRECTORY, _PARTITION, _VERITY = "X-kata.mkdir.path=", "X-kata.partition-number=", "X-kata.dmverity."


def belongs(request):
    """Whether a ``grpc.Storage`` is part of a group."""
    return request.driver == DRIVER or _MEMBER in request.options


def mount_point(group):
    """Where the group's overlay goes. :raises RpcError: there is no writable image, or more than one."""
    return _split(group)[0].mount_point


def mount(group, cid, timeout_s):
    """Mount all images and the overlay over them; returns where the images are."""
    upper, lowers = _split(group)
    base = f"/run/kata-containers/{cid or 'sandbox'}/multi-layer"
    places = [f"{base}/upper", *(f"{base}/lower-{index}" for index in range(len(lowers)))]
    done = []
    try:
        for request, place in zip([upper, *lowers], places):
            _mount_image(request, place, request is upper, timeout_s)
            done.append(place)
        _make_directories(upper, places)
        for name in ("upper", "work"):
            os.makedirs(f"{places[0]}/{name}", exist_ok=True)
        mounts.mount("overlay", upper.mount_point, "overlay", [
            f"lowerdir={':'.join(places[1:])}", f"upperdir={places[0]}/upper", f"workdir={places[0]}/work"])
    except BaseException:
        for place in reversed(done):
            mounts.unmount(place)
        raise
    return places


def _split(group):
    uppers = [item for item in group
              if _UPPER in item.options or _LOWER not in item.options and item.fstype == "ext4"]
    lowers = [item for item in group if item not in uppers]
    if len(uppers) != 1 or not lowers:
        raise RpcError(INTERNAL, f"multi-layer erofs needs one ext4 upper layer and erofs lower layers, "
                                 f"not {len(uppers)} and {len(lowers)}")
    return uppers[0], lowers


def _mount_image(request, place, writable, timeout_s):
    if any(word.startswith(_VERITY) for word in request.options):
        raise RpcError(INTERNAL, "layers with dm-verity are not supported by this guest")
    address = request.source
    driver = "mmioblk" if address.startswith("/dev/") else "blk"
    device = devices.locate(driver, address, timeout_s)
    for word in request.options:
        if word.startswith(_PARTITION):
            number = word[len(_PARTITION):]
            if not number.isdigit():
                raise RpcError(INVALID_ARGUMENT, f"{word!r}: not a number")
            device = devices.wait_for_node(f"{device}{number}", timeout_s)
    words = [word for word in request.options if not word.startswith("X-kata.")]
    mounts.mount(device, place, request.fstype, words if writable else [*words, "ro"])


def _make_directories(upper, places):
    for word in upper.options:
        if word.startswith(_MAKE_DIRECTORY):
            path = word[len(_MAKE_DIRECTORY):].partition(":")[0]
            for index in (0, 1):
                path = path.replace(f"{{{{ mount {index} }}}}", places[index])
            if not path:
                raise RpcError(INVALID_ARGUMENT, f"{word!r}: no path")
            os.makedirs(path, exist_ok=True)
