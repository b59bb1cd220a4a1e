"""What the end-to-end tests, the demo and the soak runs stand on.

    image        a busybox OCI image made on the spot
    containerd   a private containerd, its ctr, and their ends by signal
    leaks        what the machine holds, before and after
    trees        other versions of the real components, in Debian trees
    demo         ``make demo``
    setup.sh     ``make setup``
"""
