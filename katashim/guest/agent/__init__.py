"""The agent inside the guest: the Kata agent's protocol over vsock, with crun underneath.

It is PID 1 of the reference guest, and runs as an ordinary process too (on a unix socket, for tests).
Only Python's standard library, and of that only what loads fast: under TCG a module costs 10 to 40 ms of
every VM's start, so `_socket` stands for `socket`, and `re`, `enum`, `typing`, `json`, `subprocess` and
`logging` are loaded where they are needed or never.

    main        start-up          settings    the kernel's command line       boot       what PID 1 mounts
    server      ttRPC             services    RPC -> function                 rpcerror   what a caller is told
    sandbox     the pod           container   one container                   process    a process and its stdio
    spec        OCI spec, amended crun        the container runtime           enter      exec without crun
    storage     mounts for pods   devices     finding them                    uevents    hearing of them
    network     netlink           cgroup      counters, freezer, OOM          linux      system calls
"""
