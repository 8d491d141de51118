"""Python's cyclic garbage collector, for what receives."""

from __future__ import annotations

import gc

OBJECTS = 10_000
"""New objects until the collector looks at them: those of so many requests that most have ended
by then. With Python's own 700 it looks at a few requests, finds them under way, and keeps them
to be looked at again."""


def spare_requests() -> None:
    """Leave alone what the imports made, and look at new objects more rarely.

    To be called after the imports. No request that goes well waits for the collector: a backlog
    of 20,000 leaves not one cycle.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(OBJECTS)
