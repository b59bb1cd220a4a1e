"""The task events of containerd (containerd.events), made from containers and processes.

Each function returns ``(topic, message)``. containerd's contract on their order is kept by the
callers: create < start < exit < delete, exec-added < exec-started < exit.
"""

from katashim.ttrpc import proto


def _message(name, **fields):
    return proto.build(proto.get(f"containerd.events.{name}"), **fields)


def create(container):
    settings = container.settings
    return "/tasks/create", _message(
        "TaskCreate", container_id=container.id, bundle=container.bundle, pid=container.sandbox.pid,
        rootfs=settings.rootfs,
        io={"stdin": settings.stdin, "stdout": settings.stdout, "stderr": settings.stderr,
            "terminal": settings.terminal})


def start(container):
    return "/tasks/start", _message("TaskStart", container_id=container.id, pid=container.sandbox.pid)


def exit(process):
    return "/tasks/exit", _message(
        "TaskExit", container_id=process.container.id, id=process.exec_id or process.container.id,
        pid=process.container.sandbox.pid, exit_status=process.exit_status,
        exited_at=proto.timestamp(process.exited_at_ns))


def delete(container):
    process = container.init
    return "/tasks/delete", _message(
        "TaskDelete", container_id=container.id, pid=container.sandbox.pid,
        exit_status=process.exit_status, exited_at=proto.timestamp(process.exited_at_ns))


def exec_added(process):
    return "/tasks/exec-added", _message(
        "TaskExecAdded", container_id=process.container.id, exec_id=process.exec_id)


def exec_started(process):
    return "/tasks/exec-started", _message(
        "TaskExecStarted", container_id=process.container.id, exec_id=process.exec_id,
        pid=process.container.sandbox.pid)


def oom(container):
    return "/tasks/oom", _message("TaskOOM", container_id=container.id)


def paused(container):
    return "/tasks/paused", _message("TaskPaused", container_id=container.id)


def resumed(container):
    return "/tasks/resumed", _message("TaskResumed", container_id=container.id)
