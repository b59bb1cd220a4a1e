"""The last of what a guest or a VMM printed, always at hand for errors.

A :class:`Tail` reads one pipe or socket, the guest's console or the VMM's stderr, and keeps the end of
it in memory. Nothing that the other side does can block or exhaust the shim: reading is in bursts
with pauses between them, so a guest that floods its console is slowed down by its own full buffer.

Used by the drivers; the text goes into every error of a start that failed.
"""

import logging
import os
import re
import time
from collections import deque

import gevent
from gevent.socket import wait_read

from katashim import green

log = logging.getLogger(__name__)

KEPT_BYTES = 64 * 1024
_BURST_BYTES = 256 * 1024       # read at once, then pause: at most 12 MiB/s, in 50 bursts
_PAUSE_S = 0.02
_READ_BYTES = 64 * 1024
_MARK_MAX = 64
_LINE_MAX = 4096                # for the log; a longer line is cut

# What a terminal would swallow: CSI and OSC sequences, two-byte escapes, other control bytes.
_UNPRINTABLE = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[^\[\]]|[\x00-\x08\x0b-\x1f\x7f]")


class Tail:
    """Keeps the end of what comes out of a file descriptor, which it owns from now on.

    :param name: what it is, for the log: "console of sandbox x".
    :param fd: readable end of a pipe or a connected socket.
    :param size: how many bytes are kept.
    :param mark: compiled pattern of bytes, of at most 64, whose first appearance is timed, or None.
    :param log_lines: also write each line to the debug log.
    :ivar first_at: monotonic time of the first output, or None. :ivar mark_at: likewise of `mark`.
    """

    def __init__(self, name, fd, size=KEPT_BYTES, mark=None, log_lines=False):
        os.set_blocking(fd, False)
        self.name = name
        self.first_at = self.mark_at = None
        self._fd, self._size, self._mark, self._log_lines = fd, size, mark, log_lines
        self._at_end = False
        self._pieces = deque()
        self._kept = 0
        self._overlap = b""         # the end of the last piece, for a mark that was cut in two
        self._line = b""            # of the log, not ended yet
        self._reader = green.spawn(f"reader of the {name}", self._read)

    def text(self):
        """What is kept, as clean text, including what has just arrived. Never blocks."""
        self._drain(_BURST_BYTES)
        kept = b"".join(self._pieces)[-self._size:]
        return _UNPRINTABLE.sub(b"", kept).decode("utf-8", "replace")

    def last_line(self):
        """The last line that is not blank, or ""."""
        return next((line.strip() for line in reversed(self.text().splitlines()) if line.strip()), "")

    @property
    def ended(self):
        """Whether the other side has closed it, or we have."""
        return self._at_end or self._fd is None

    def wait_end(self, timeout_s):
        """Wait until all was read, for a writer that is known to have exited; True when it was."""
        self._reader.join(timeout_s)
        return self.ended

    def close(self):
        """Stop reading; the text stays."""
        self._reader.kill()
        self._release()

    def _read(self):
        while True:
            wait_read(self._fd)
            self._drain(_BURST_BYTES)
            if self._at_end:
                break
            gevent.sleep(_PAUSE_S)
        self._release()

    def _drain(self, limit):
        """Take what is there, `limit` bytes at most. The reader alone closes the fd that it waits on."""
        while not self.ended and limit > 0:
            try:
                piece = os.read(self._fd, min(limit, _READ_BYTES))
            except BlockingIOError:
                return
            except OSError:             # ECONNRESET: the writer died with our own bytes unread
                piece = b""
            if piece:
                limit -= len(piece)
                self._keep(piece)
            else:
                self._at_end = True

    def _keep(self, piece):
        now = time.monotonic()
        if self.first_at is None:
            self.first_at = now
        if self._mark is not None and self.mark_at is None:
            if self._mark.search(self._overlap + piece):
                self.mark_at = now
            self._overlap = (self._overlap + piece)[-_MARK_MAX:]
        self._pieces.append(piece)
        self._kept += len(piece)
        while self._kept - len(self._pieces[0]) >= self._size:
            self._kept -= len(self._pieces.popleft())
        if self._log_lines:
            self._log(piece)

    def _log(self, piece):
        *lines, rest = (self._line + piece).split(b"\n")
        self._line = rest[-_LINE_MAX:]
        for line in lines:
            log.debug("%s: %s", self.name, _UNPRINTABLE.sub(b"", line[:_LINE_MAX]).decode("utf-8", "replace"))

    def _release(self):
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
