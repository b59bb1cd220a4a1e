"""The agent's start: as PID 1 prepare the guest, then listen, then serve for ever.

What can wait until the host is connected waits: the host asks first for the agent's health, and the
drivers of network and filesystems are loaded meanwhile. Its settings are the words of /proc/cmdline
(settings.py); nothing is read from argv.
"""

import os
import sys
import threading
from _signal import SIG_DFL, SIGINT, signal

from katashim.guest.agent import linux, log

_LAST_ANSWERS_S = 0.3       # for hosts to read their last answers
_DRAIN_S = 2.0              # for the console to take the last words
_TCSBRK = 0x5409            # with 1: wait until all output is out (tcdrain)


def main():
    """Run the agent; returns only when it is an ordinary process and has been told to end."""
    init = os.getpid() == 1
    if init:
        log.console("katashim agent: starting")
        signal(SIGINT, SIG_DFL)     # which the kernel drops for PID 1: ^C on the console is not for us
    try:
        _run(init)
    except BaseException:
        import traceback
        log.console(f"katashim agent: cannot go on\n{traceback.format_exc()}")
        if not init:
            raise
    if init:
        power_off()


def power_off():
    """Write everything back and end the machine; under a kernel without ACPI, by a reset, which the
    hypervisor is told to take for the end (QEMU's -no-reboot, Firecracker always)."""
    # A host that does not read the console must not keep the machine up.
    drain = threading.Thread(target=_drain_console, name="drain", daemon=True)
    drain.start()
    os.sync()
    drain.join(_DRAIN_S)
    linux.reboot(linux.RB_POWER_OFF if os.path.isdir("/sys/firmware/acpi/tables") else linux.RB_AUTOBOOT)


def _open_stdio():
    """Without a console the kernel starts us without fds 0 to 2, and other files would get those numbers."""
    while (fd := os.open("/dev/null", os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _drain_console():
    """Wait until the last words are out: the serial port is slow, and what it has not sent yet gets lost."""
    import fcntl
    try:
        fcntl.ioctl(2, _TCSBRK, 1)
    except OSError as exc:
        log.debug("main", f"the console cannot be waited for: {exc}")


def _run(init):
    from katashim.guest.agent import boot, settings, sockets
    if init:
        boot.mount_all()
        _open_stdio()
        os.environ.clear()
        os.environ["PATH"] = boot.PATH
    chosen = settings.from_kernel()
    log.level = chosen.log
    if init:
        boot.mount_cgroups(chosen.unified_cgroups)
        boot.load_modules(chosen.console)
    listener = sockets.listen(chosen.server_addr)
    if init:
        threading.Thread(target=_finish_boot, args=(boot, chosen), name="boot", daemon=True).start()
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    # A child that has entered a container but has not executed anything yet must not be open to those there.
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    _serve(listener, chosen)


def _finish_boot(boot, chosen):
    from katashim.guest.agent import console, modules, uevents
    try:
        boot.hurry_rcu()
        uevents.start()
        modules.load_present()
        boot.allow_many_files()
        boot.read_ahead()
        boot.set_host_name()
        boot.loopback_up()
        boot.take_terminal()
        console.start(chosen)
    except Exception:  # noqa: BLE001  the agent answers already: its host must hear of it, not lose the VM
        log.unforeseen("boot", "the guest is not complete")


def _serve(listener, chosen):
    from katashim.guest import wire
    from katashim.guest.agent import reaper, services
    from katashim.guest.agent.server import Server
    messages, methods = _tables()
    codec = wire.Codec(messages)
    ended = threading.Event()
    handlers = services.handlers(codec, chosen, ended.set)
    reaper.start()
    server = Server(codec, methods, handlers)
    threading.Thread(target=server.serve, args=(listener,), name="accept", daemon=True).start()
    ended.wait()
    server.wait_alone(_LAST_ANSWERS_S)


def _tables():
    """The message tables: written into the image by its builder, or made on the spot from the sources."""
    try:
        from katashim.guest.agent import messages
    except ImportError:
        from katashim.guest import tables
        return tables.load()
    return messages.MESSAGES, messages.SERVICES


if __name__ == "__main__":
    sys.exit(main())
