"""The header of virtio-vsock packets (VIRTIO 1.2, section 5.10.6) and the numbers in it."""

import struct

# src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt
HEADER = struct.Struct("<QQIIIHHIII")
HEADER_SIZE = 44

HOST_CID = 2
TYPE_STREAM = 1

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)

# Flags of SHUTDOWN: what its sender will not do any more.
NO_RECEIVE, NO_SEND = 1, 2


def split(views):
    """Part a transmitted chain into its header's fields and the views of what follows.

    :returns: ``(fields, [memoryview])``, or None when the chain is shorter than a header.
    """
    if not views:
        return None
    first = views[0]
    if len(first) == HEADER_SIZE:
        return HEADER.unpack_from(first), views[1:]
    if len(first) > HEADER_SIZE:
        return HEADER.unpack_from(first), [first[HEADER_SIZE:], *views[1:]]
    header, rest = b"", []
    for view in views:
        missing = HEADER_SIZE - len(header)
        header += view[:missing]
        if len(view) > missing:
            rest.append(view[missing:])
    if len(header) < HEADER_SIZE:
        return None
    return HEADER.unpack(header), rest


def room(views):
    """What a receive buffer has for data, behind the header: views, maybe none.

    :returns: None when not even a header fits.
    """
    if views:
        first = views[0]
        if len(first) == HEADER_SIZE:
            return views[1:]
        if len(first) > HEADER_SIZE:
            return [first[HEADER_SIZE:], *views[1:]]
    left, rest = HEADER_SIZE, []
    for view in views:
        if len(view) > left:
            rest.append(view[left:])
        left -= min(left, len(view))
    return None if left else rest


def put(views, header):
    """Write the packed header to the beginning of a receive buffer that has room for it."""
    first = views[0]
    if len(first) >= HEADER_SIZE:
        first[:HEADER_SIZE] = header
        return
    at = 0
    for view in views:
        part = header[at:at + len(view)]
        view[:len(part)] = part
        at += len(part)
