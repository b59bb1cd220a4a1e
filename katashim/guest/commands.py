"""Programs of the host that the image builder runs: checked for first, run with their words kept.

Called by the other modules of the builder; plain.
"""

import os
import shutil
import subprocess
import threading

from katashim.errors import DeadlineExceeded, FailedPrecondition, Internal

TAIL_BYTES = 4000       # of a failing program's output, for the error


def require(tools):
    """Check that programs are installed.

    :param tools: ``{program: Debian package}``.
    :raises FailedPrecondition: names each missing program and the command that installs them all.
    """
    missing = {program: package for program, package in tools.items() if shutil.which(program) is None}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise FailedPrecondition(
            f"building the guest image needs {', '.join(sorted(missing))}: apt-get install {packages}")


def run(argv, *, what, timeout_s=600, cwd=None, env=None, stdin=None):
    """Run a program to its end and return what it printed on stdout (bytes).

    :param argv: list of str. :param what: what it does, for errors. :param env: additions to ours.
    :param stdin: bytes to feed it, or None for /dev/null.
    :raises Internal: it failed; carries the end of its output.
    :raises DeadlineExceeded: it did not end within `timeout_s`; it has been killed.
    """
    try:
        done = subprocess.run(
            argv, check=False, cwd=cwd, env={**os.environ, **(env or {})}, timeout=timeout_s,
            capture_output=True,
            **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}))
    except subprocess.TimeoutExpired as exc:
        raise DeadlineExceeded(f"waited {timeout_s} s for {what} ({argv[0]})") from exc
    if done.returncode != 0:
        said = (done.stdout + b"\n" + done.stderr)[-TAIL_BYTES:].decode(errors="replace").strip()
        raise Internal(f"{what} failed: {argv[0]} ended with {done.returncode}").attach(
            f"output of {argv[0]}", said)
    return done.stdout


def run_logged(argv, log_path, *, what, on_line=None, timeout_s=3600, cwd=None, env=None):
    """Run a long program with its output in a file, and hand each line of it to `on_line`.

    :raises Internal, DeadlineExceeded: as :func:`run`.
    """
    with open(log_path, "wb") as log:
        process = subprocess.Popen(argv, cwd=cwd, env={**os.environ, **(env or {})},
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        late = threading.Event()
        timer = threading.Timer(timeout_s, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            for line in process.stdout:
                log.write(line)
                if on_line is not None:
                    on_line(line.decode(errors="replace").rstrip())
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
    if late.is_set():
        raise DeadlineExceeded(f"waited {timeout_s} s for {what} ({argv[0]}); see {log_path}")
    if status != 0:
        with open(log_path, "rb") as log:
            said = log.read()[-TAIL_BYTES:].decode(errors="replace")
        raise Internal(f"{what} failed: {argv[0]} ended with {status}").attach(str(log_path), said)
