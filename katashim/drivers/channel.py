"""The one owner of a VMM's API socket: one exchange at a time, in order, each with a deadline.

A VMM's control socket carries one conversation. Two callers on it at once read each other's replies;
a caller that gives up in the middle leaves half an exchange for the next. So each VMM has one
Channel, and a caller's turn lasts for a whole exchange: write, pass fds, read to the last byte.
Turns are given in the order in which they were asked for.

Three rules make it safe:

* An exchange that ends in any other way than by a complete reply (time ran out, its greenlet was
  killed, the bytes made no sense) *poisons* the connection: it is closed, and the next turn opens
  a fresh one.
* A sequence that must not be interrupted takes the turn across its exchanges with :meth:`Channel.hold`.
* :meth:`Channel.close` fails the one who has the turn and all who wait for it at once, so a stuck
  exchange can never block a teardown.

The channel knows no protocol: QMP is katashim.drivers.qmp. Used by the drivers from any greenlet.
"""

import logging
import time
from collections import deque
from contextlib import contextmanager
from typing import NamedTuple

from gevent import get_hub, getcurrent
from gevent.event import Event

from katashim import green
from katashim.errors import ConnectionClosed

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Somebody who has the turn or waits for it."""

    who: str            # the greenlet's name
    op: str             # what for
    seconds: float      # for how long already


class Queue(NamedTuple):
    """Who uses a channel: for the operator, and for the text of errors."""

    holder: Place       # None when it is free
    waiting: tuple      # of Place, the next one first


class _Turn:
    """One caller's claim to the channel."""

    def __init__(self, op):
        self.op = op
        self.doing = ""             # within a hold: the exchange that runs
        self.greenlet = getcurrent()
        self.since = time.monotonic()
        self.given = Event()
        self.talking = False        # inside connect or an exchange, where close() may interrupt it

    def place(self):
        name = getattr(self.greenlet, "name", None) or f"greenlet {id(self.greenlet):#x}"
        op = f"{self.op}: {self.doing}" if self.doing else self.op
        return Place(name, op, time.monotonic() - self.since)


class Channel:
    """See the module's text.

    :param name: what is at the other end, for errors: "QEMU's monitor of sandbox x".
    :param connect: function without arguments that returns an open connection, ready for use; it may
        block. A connection has ``close()``, which does not block, and ``closed``, which is true once
        it is of no more use (the peer hung up, for example).
    :param clean: exception classes that an exchange raises only after a complete reply was read, such
        as the VMM's own refusals. All others poison the connection.
    """

    def __init__(self, name, connect, clean=()):
        self.name = name
        self._connect = connect
        self._clean = clean
        self._connection = None
        self._holder = None             # the _Turn in force; handed over, never just dropped
        self._waiting = deque()
        self._closed_for = None         # the reason given to close()

    # -- for callers ------------------------------------------------------------------------------
    def exchange(self, op, talk, timeout_s):
        """Have one exchange: ``talk(connection)``, alone on the channel.

        :param op: what it is, for errors and for the operator: "device_add".
        :param talk: blocks until the reply is complete. It must bear being interrupted wherever it
            waits; the connection is discarded then.
        :param timeout_s: seconds for all of it: waiting for the turn, connecting, talking.
        :returns: what `talk` returns.
        :raises DeadlineExceeded: names the operation, and who was in the way.
        :raises ConnectionClosed: the channel was closed, before or meanwhile.
        """
        with self._turn(op, timeout_s) as turn:
            return self._talk(turn, talk)

    @contextmanager
    def hold(self, op, timeout_s):
        """Keep the turn across several exchanges of this greenlet: ``with channel.hold("resize", 10):``.

        :param timeout_s: seconds for all that happens inside the block, the waiting for the turn included.
        """
        with self._turn(op, timeout_s):
            yield self

    def open(self, timeout_s):
        """Connect now rather than at the first exchange."""
        self.exchange("connecting", lambda connection: None, timeout_s)

    def queue(self):
        """Who has the turn and who waits: a :class:`Queue`. Never blocks."""
        holder = self._holder.place() if self._holder else None
        return Queue(holder, tuple(turn.place() for turn in self._waiting))

    @property
    def closed(self):
        """Whether :meth:`close` was called."""
        return self._closed_for is not None

    def close(self, reason):
        """End the channel for good; everybody on it gets ConnectionClosed with `reason`. Never blocks."""
        if self.closed:
            return
        self._closed_for = reason
        self._discard()
        for turn in self._waiting:
            turn.given.set()            # they find the channel closed
        self._waiting.clear()
        if self._holder is not None and self._holder.greenlet is not getcurrent():
            # From the hub, for the holder may be anywhere between two switches until then.
            get_hub().loop.run_callback(self._interrupt, self._holder)

    # -- turns ------------------------------------------------------------------------------------
    @contextmanager
    def _turn(self, op, timeout_s):
        """The turn for the length of the block; the holder's own greenlet has it already."""
        if self._holder is not None and self._holder.greenlet is getcurrent():
            with green.deadline(timeout_s, lambda: f"{self.name} to answer {op!r}"):
                outer, self._holder.doing = self._holder.doing, op
                try:
                    yield self._holder
                finally:
                    self._holder.doing = outer
            return
        turn = _Turn(op)
        with green.deadline(timeout_s, lambda: self._what_it_waits_for(turn)):
            self._take(turn)
            try:
                yield turn
            finally:
                self._pass_on()

    def _take(self, turn):
        self._check_open()
        if self._holder is None:
            self._holder = turn
            turn.given.set()
            return
        self._waiting.append(turn)
        try:
            turn.given.wait()
        except BaseException:
            # Killed or out of time. The turn may have been handed over in the same moment.
            if self._holder is turn:
                self._pass_on()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise
        if self._holder is not turn:
            self._check_open()

    def _pass_on(self):
        """Hand the turn to the next in the queue, directly, so that nobody can slip in between."""
        if self._waiting:
            self._holder = self._waiting.popleft()
            self._holder.since = time.monotonic()
            self._holder.given.set()
        else:
            self._holder = None

    def _what_it_waits_for(self, turn):
        """The object of the sentence "nothing after 5 s while waiting for ..."."""
        if turn.given.is_set() or self._holder is None:
            return f"{self.name} to answer {turn.op!r}"
        who, op, seconds = self._holder.place()
        return (f"a turn at {self.name} for {turn.op!r}: {who} has had it "
                f"for {seconds:.1f} s for {op!r}")

    # -- exchanges --------------------------------------------------------------------------------
    def _talk(self, turn, talk):
        self._check_open()
        turn.talking = True
        try:
            if self._connection is None or self._connection.closed:
                self._discard()
                self._connection = self._connect()
            return talk(self._connection)
        except self._clean:
            raise
        except BaseException:
            self._discard()
            raise
        finally:
            turn.talking = False

    def _check_open(self):
        if self.closed:
            raise ConnectionClosed(f"{self.name} is closed: {self._closed_for}")

    def _interrupt(self, turn):
        """Raise in the holder where it waits; runs in the hub."""
        if turn is self._holder and turn.talking:
            turn.greenlet.throw(ConnectionClosed(
                f"{self.name} was closed during {turn.op!r}: {self._closed_for}", maybe_executed=True))

    def _discard(self):
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
