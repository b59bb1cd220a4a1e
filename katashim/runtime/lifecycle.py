"""The one table of a sandbox's life, and the greenlet that owns it.

Everything that may change the life of a sandbox (an RPC, the death of the VMM, the loss of the agent
or of virtiofsd, the end of a bring-up) is a verb, posted to the owner's queue. The owner looks the
verb up in the table and enters the next state; the work of a state runs in a greenlet of its own and
reports its end as a verb. So the owner never waits, a shutdown is heard in the middle of a boot, and
ten of them are one. A verb that has no place in the table for the present state changes nothing: a
VMM that exits while it is being stopped is no news.
"""

import logging

from gevent.event import Event
from gevent.queue import Queue

from katashim import green

log = logging.getLogger(__name__)

INIT, BOOTING, READY, STOPPING, STOPPED = "init", "booting", "ready", "stopping", "stopped"

TABLE = {
    (INIT, "boot"): BOOTING,
    (INIT, "stop"): STOPPED,            # nothing was acquired
    (BOOTING, "booted"): READY,
    (BOOTING, "boot-failed"): STOPPING,
    (BOOTING, "stop"): STOPPING,
    (BOOTING, "vmm-exited"): STOPPING,
    (BOOTING, "share-lost"): STOPPING,
    (READY, "stop"): STOPPING,
    (READY, "vmm-exited"): STOPPING,
    (READY, "agent-lost"): STOPPING,
    (READY, "share-lost"): STOPPING,
    (STOPPING, "torn-down"): STOPPED,
}


class Lifecycle:
    """The state of one sandbox and its owner.

    :param name: for the log.
    :param entering: ``{state: function(cause)}``, the work of a state; it is started, not waited for.
    :ivar state: a constant of this module; changed by the owner only, read by everybody.
    :ivar cause: why it left READY or BOOTING: an exception or a sentence; None while it has not.
    """

    def __init__(self, name, entering):
        self.state = INIT
        self.cause = None
        self._name = name
        self._entering = entering
        self._posted = Queue()
        self._reached = {state: Event() for state in (READY, STOPPING, STOPPED)}
        self.settled = Event()          # READY or on its way down: the bring-up is over
        self._owner = green.spawn(f"owner of {name}", self._own)

    def post(self, verb, cause=None):
        """Tell the owner; returns at once.

        :param verb: one of the table's. :param cause: an exception or a sentence, for the record.
        """
        self._posted.put((verb, cause))

    def reached(self, state):
        """The Event that is set when `state` (READY, STOPPING, STOPPED) has been entered once."""
        return self._reached[state]

    def _own(self):
        while self.state != STOPPED:
            verb, cause = self._posted.get()
            following = TABLE.get((self.state, verb))
            if following is None:
                log.debug("%s: %s changes nothing in state %s", self._name, verb, self.state)
                continue
            self._enter(following, verb, cause)

    def _enter(self, state, verb, cause):
        log.info("sandbox %s: %s -> %s (%s)", self._name, self.state, state, verb)
        self.state = state
        if state in (STOPPING, STOPPED) and self.cause is None:
            self.cause = cause or f"it was told to {verb}"
        if state in self._reached:
            self._reached[state].set()
        if state != BOOTING:
            self.settled.set()
        work = self._entering.get(state)
        if work is not None:
            green.spawn(f"{state} of {self._name}", work)
