"""The undo stack: every acquired thing registers its release, in memory and in a journal on disk.

A thing that outlives a process (a VMM, a mount, a tap, a cgroup, a socket, a directory) is written
to the journal *before* it is acquired. An error unwinds the stack, newest first; after a SIGKILL of
the shim, ``containerd-shim-katashim-v2 delete`` replays the journal. So releases are idempotent:
releasing what was never acquired is no error.

The journal is a file of JSON lines below /run/kata/<sandbox id>/. It needs no fsync: it must survive
the death of the process, not of the host, for a reboot empties /run and all the things with it.

What a kind of thing is, and how it is released, is told by a table ``{kind: function(**args)}``
handed in by the caller (katashim.resources.releases), so that this module stands below them all.
"""

import json
import logging
import os
import threading

from katashim.errors import KatashimError

log = logging.getLogger(__name__)

_COMPACT_BYTES = 256 * 1024


class Entry:
    """One acquired thing on the stack."""

    def __init__(self, stack, number, kind, args, what):
        self._stack, self._number = stack, number
        self.kind, self.args, self.what = kind, args, what

    def __repr__(self):
        return self.what

    def update(self, **args):
        """Complete what is known only after the thing exists, such as a pid."""
        self.args.update(args)
        self._stack._journal.write({"id": self._number, "do": "update", "args": args})
        self.what = _describe(self.kind, self.args)

    def release(self):
        """Release the thing now and take it off the stack. An error leaves it there and is raised."""
        with self._stack._turn:
            self._stack._run(self)
            self.forget()

    def forget(self):
        """Take it off the stack without a release: it is gone already, or not ours any more."""
        if self in self._stack._entries:
            self._stack._entries.remove(self)
            try:
                self._stack._journal.write({"id": self._number, "do": "drop"})
            except KatashimError as exc:        # a later replay releases it once more, which does nothing
                log.warning("%s", exc)


class Undo:
    """A stack of releases; see the module's text.

    :param path: the journal's file, or None for a stack in memory only.
    :param releases: ``{kind: function(**args)}``, plain blocking functions.
    :param run: how to call a release, ``run(function, args, what)``; the daemon's goes through a
        native thread with a deadline.
    :param header: plain data for the journal's first line (who writes it).
    """

    def __init__(self, path=None, releases=None, run=None, header=None, _journal=None):
        self._journal = _journal or _Journal(path, header)
        self._releases = releases or {}
        self._call = run or _run_here
        self._entries = []
        # Who releases. A Delete and the end of its sandbox may want the same things released at once.
        # (threading's lock: of greenlets in the daemon, where it is patched; of no use elsewhere.)
        self._turn = threading.RLock()

    def __len__(self):
        return len(self._entries)

    def __bool__(self):
        return True         # an empty stack is a stack: `undo or default` must not drop it

    def entries(self):
        """What is on the stack, oldest first, in words (child stacks included)."""
        found = []
        for entry in self._entries:
            found.extend(entry.args["stack"].entries() if entry.kind == "stack" else [entry.what])
        return found

    def push(self, kind, **args):
        """Register a thing of `kind` that is about to be acquired; `args` are JSON values."""
        if kind not in self._releases:
            raise KeyError(f"no release is known for {kind!r}")
        number = self._journal.next_number()
        self._journal.write({"id": number, "do": "push", "kind": kind, "args": args})
        entry = Entry(self, number, kind, args, _describe(kind, args))
        self._entries.append(entry)
        return entry

    def call(self, what, function, *args):
        """Register an in-memory release (closing a connection, stopping a greenlet)."""
        number = self._journal.next_number()
        entry = Entry(self, number, "call", {"function": function, "args": args}, what)
        self._entries.append(entry)
        return entry

    def child(self, name):
        """A stack of its own in the same journal; unwinding this stack unwinds it at its place."""
        stack = Undo(releases=self._releases, run=self._call, _journal=self._journal)
        entry = Entry(self, self._journal.next_number(), "stack", {"stack": stack}, name)
        self._entries.append(entry)
        stack._place = (self, entry)
        return stack

    def scope(self):
        """``with undo.scope():`` an exception inside unwinds what was pushed inside."""
        return _Scope(self)

    def unwind(self, down_to=0):
        """Release everything above the first `down_to` entries, newest first; goes on after errors.

        :returns: ``[(entry, exception)]`` of the releases that failed; those entries stay in the
            journal, so that `delete` tries them again.
        """
        failed = []
        with self._turn:
            while len(self._entries) > down_to:
                entry = self._entries[-1]
                try:
                    if entry.kind == "stack":
                        failed.extend(entry.args["stack"].unwind())
                    else:
                        self._run(entry)
                        entry.forget()
                except (KatashimError, OSError) as exc:
                    log.warning("could not release %s: %s", entry.what, exc)
                    failed.append((entry, exc))
                self._drop(entry)
        return failed

    def finish(self):
        """Unwind a child stack and take it out of its parent's; the same answer as `unwind`."""
        failed = self.unwind()
        parent, entry = self._place
        parent._drop(entry)
        return failed

    def close(self):
        """Close the journal's file (it stays on disk)."""
        self._journal.close()

    def _drop(self, entry):
        if entry in self._entries:
            self._entries.remove(entry)

    def _run(self, entry):
        if entry.kind == "call":
            entry.args["function"](*entry.args["args"])
        else:
            self._call(self._releases[entry.kind], entry.args, "releasing " + entry.what)


class _Scope:
    def __init__(self, stack):
        self._stack = stack

    def __enter__(self):
        self._mark = len(self._stack)
        return self._stack

    def __exit__(self, kind, error, trace):
        if error is not None:
            self._stack.unwind(self._mark)
        return False


def _run_here(function, args, what):
    function(**args)


def _describe(kind, args):
    return f"{kind} " + " ".join(f"{key}={value}" for key, value in args.items())


class _Journal:
    """The file behind a stack and its children."""

    def __init__(self, path, header):
        self._path, self._fd = path, None
        self._number = 0
        self._header = {"v": 1, **(header or {})}
        self._size = 0
        if path is not None:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self.write(self._header)

    def next_number(self):
        self._number += 1
        return self._number

    def write(self, record):
        if self._fd is None or record.get("do") in ("update", "drop") and "id" not in record:
            return
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError as exc:
            if written:         # half a line would spoil the next one
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise KatashimError(f"cannot write the journal {self._path}: {exc.strerror}") from exc
        self._size += len(line)
        if self._size > _COMPACT_BYTES:
            self._compact()

    def _compact(self):
        """Write the living entries into a new file that takes the old one's place."""
        living = read(self._path)[1]
        fresh = self._path + ".new"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        lines = [self._header] + [
            {"id": number, "do": "push", "kind": kind, "args": args} for number, kind, args in living]
        text = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
        os.write(fd, text)
        os.rename(fresh, self._path)
        os.close(self._fd)
        self._fd = fd
        # Twice what lives, so that a stack of many living things is not written anew at each push.
        self._size = 0 if len(text) > _COMPACT_BYTES // 2 else len(text)

    def close(self):
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    __del__ = close         # as the files of the standard library: a stack that is dropped leaks no fd


def read(path):
    """The journal at `path`: ``(header, [(id, kind, args)])``, living entries, oldest first.

    A last line that was cut off by the death of its writer is passed over.
    """
    header, living = {}, {}
    with open(path, "rb") as journal:
        for line in journal:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if "v" in record:
                header = record
            elif record["do"] == "push":
                living[record["id"]] = [record["id"], record["kind"], record["args"]]
            elif record["do"] == "update" and record["id"] in living:
                living[record["id"]][2].update(record["args"])
            elif record["do"] == "drop":
                living.pop(record["id"], None)
    return header, [tuple(entry) for entry in living.values()]


def replay(path, releases):
    """Release all that a dead shim's journal still holds, newest first. Plain and blocking.

    :returns: ``[(description, exception)]`` of what could not be released.
    """
    failed = []
    for _, kind, args in reversed(read(path)[1]):
        what = _describe(kind, args)
        release = releases.get(kind)
        if release is None:
            failed.append((what, KatashimError(f"this version knows no kind {kind!r}")))
            continue
        try:
            release(**args)
        except (KatashimError, OSError) as exc:
            failed.append((what, exc))
    return failed
