"""ttRPC, the small RPC protocol of containerd, its shims and the Kata agent: client and server.

    frame       bytes <-> frames, no input or output
    status      errors <-> google.rpc.Status
    connection  one socket: frames in, frames out, in order, neither waiting for the other
    stream      messages of a streaming call on their way to whoever reads them
    server      dispatch to handlers, on recycled greenlets
    client      calls and streams, many at once over one connection
    proto       the messages

docs/ttrpc.md tells the protocol and where its implementations differ.
"""
