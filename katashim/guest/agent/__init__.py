"""The agent inside the guest: the Kata agent's protocol over vsock, with crun underneath.

It is PID 1 of the reference guest, and runs as an ordinary process too (on a unix socket, for tests). Only
Python's standard library, and of that only what loads fast: under TCG a module costs 10 to 40 ms of every
VM's start, so `_socket` stands for `socket`, and `re`, `enum`, `typing`, `json`, `shutil`, `subprocess` and
`logging` are loaded where they are needed or never.

    main            start-up                    boot            what PID 1 mounts and sets
    settings        the kernel's command line   console, log    debug console, log port
    server          ttRPC                       workers         threads that run RPCs
    services        RPC -> function             *_rpcs          the RPCs
    sandbox         the pod                     container       one container
    process         a process, its stdio        reaper          ends of processes
    spec            the OCI spec, amended       crun            the container runtime
    enter           exec without crun           capability      capabilities of a process
    storage         mounts for pods             layers, watch   two kinds of storage
    devices         finding them                uevents         hearing of them
    network         the pod's network           netlink         the kernel's
    cgroup          freezer, OOM                counters        StatsContainer
    linux           system calls                rpcerror        what a caller is told
"""
