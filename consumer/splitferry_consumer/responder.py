"""The shared responder: who is waiting for the word on a request.

Many senders may have sent splits of one request, each under a correlation token of its own
(`reply`). Only the newest waits for the result; whoever held the place before is told at once
that its splits were received (WIRE, "accepted").
"""

from __future__ import annotations

import structlog

log = structlog.get_logger(__name__)


class SharedWithBatchHandler:
    """Holds the newest `reply` of one open request, until it is taken for the result."""

    def __init__(self) -> None:
        self._reply: bytes | None = None
        self._taken = False

    @property
    def reply(self) -> bytes | None:
        return self._reply

    def update(self, reply: bytes | None) -> bytes | None:
        """A split brought `reply`. Returns the older one, which is to be told of success now.

        None comes back when nobody is to be told: the split brought no token, or the one that
        is held, or the first.
        """
        if reply is None or reply == self._reply:
            return None
        if self._taken:
            # After the end a new token is owed the recorded result (`repeat`), which is the
            # ledger's to tell: getting here means that a decision was applied out of order.
            log.error("responder update error", reply=reply.hex())
            raise RuntimeError("the reply of this request was already taken for its result")
        older, self._reply = self._reply, reply
        return older

    def final(self) -> bytes | None:
        """Take the token for the result. Raises RuntimeError the second time."""
        if self._taken:
            raise RuntimeError("the reply of this request was already taken for its result")
        self._taken = True
        return self._reply

    def __repr__(self) -> str:
        held = None if self._reply is None else self._reply.hex()
        return f"<SharedWithBatchHandler reply={held} taken={self._taken}>"
