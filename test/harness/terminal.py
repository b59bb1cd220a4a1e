"""A program on a terminal, for containers that are run with ``-t``."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time

# A shell command that prints the size of its terminal. ctr tells of the size after the start of the task;
# until then it is unknown, and busybox's stty complains with exit status 0.
PRINT_SIZE = 'until [ -n "$(stty size 2>/dev/null)" ]; do sleep 0.05; done; stty size'


class Terminal:
    """A program with a pseudo-terminal as its stdin, stdout and stderr, and as its controlling terminal.

    :param argv/env: what to run. :param rows/columns: the window's size.
    :ivar text: all that it has printed so far, as bytes.
    """

    def __init__(self, argv, env, rows=24, columns=80):
        self.argv = argv
        self.text = b""
        self._ours, theirs = pty.openpty()
        self.resize(rows, columns)
        try:
            # setsid makes it the controlling terminal, so that SIGWINCH arrives, and becomes the program.
            self.process = subprocess.Popen(["setsid", "--ctty", *argv], env=env, stdin=theirs,
                                            stdout=theirs, stderr=theirs)
        finally:
            os.close(theirs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def resize(self, rows, columns):
        """Change the window's size; the program gets SIGWINCH."""
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, data):
        """Type `data` (bytes)."""
        while data:
            data = data[os.write(self._ours, data):]

    def read_until(self, wanted, timeout_s=30):
        """Read until `wanted` (bytes) has been printed; returns all text up to its end.

        What follows stays for the next call. :raises AssertionError: it ended, or time ran out, before.
        """
        end = time.monotonic() + timeout_s
        while wanted not in self.text:
            more = self._read(end - time.monotonic())
            assert more, f"{wanted!r} did not appear on the terminal of {self.argv}, but: {self.text[-2000:]!r}"
            self.text += more
        at = self.text.index(wanted) + len(wanted)
        found, self.text = self.text[:at], self.text[at:]
        return found

    def wait(self, timeout_s=30):
        """Read to the end; returns ``(exit status, rest of the text)``."""
        end = time.monotonic() + timeout_s
        while more := self._read(end - time.monotonic()):
            self.text += more
        return self.process.wait(max(0.1, end - time.monotonic())), self.text

    def _read(self, timeout_s):
        """More text; empty when it ended. :raises AssertionError: time ran out."""
        ready, _, _ = select.select([self._ours], [], [], max(0, timeout_s))
        assert ready, f"nothing more on the terminal of {self.argv} after: {self.text[-2000:]!r}"
        try:
            return os.read(self._ours, 65536)
        except OSError:
            return b""              # EIO: the last program on the terminal has closed it

    def close(self):
        """End the program, if it still runs, and close the terminal."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
        os.close(self._ours)
