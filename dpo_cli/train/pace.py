"""How often a run is saved if the configuration gives no interval in steps."""

from __future__ import annotations

import time
from collections.abc import Callable

MIN_SECONDS = 300.0  # between two saves
MAX_SHARE = 0.02  # of a run's time that saves may take
FREE_SECONDS = 1.0  # shorter saves are not counted


class Pace:
    """Saves at least five minutes apart that take at most 2% of the run's time so far.

    minutes: the configured interval, if any. Only which steps are saved may depend on the clock.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes, self.clock = minutes, clock
        self.began = self.last = clock()
        self.spent = self.latest = self.writing = 0.0

    def due(self, busy: bool) -> bool:
        """busy: the last save is still being written."""
        since = self.clock() - self.last
        if self.minutes is not None:
            return since >= 60 * self.minutes
        return since >= MIN_SECONDS and self.affordable(busy)

    def affordable(self, busy: bool) -> bool:
        """Whether a save that takes as long as the latest stays within MAX_SHARE."""
        cost = self.latest + (self.writing if busy else 0.0)
        allowed = MAX_SHARE * (self.clock() - self.began)
        return cost <= FREE_SECONDS or self.spent + cost <= allowed

    def stopped(self, seconds: float) -> None:
        """The loop has just waited so long for a save."""
        self.last, self.latest = self.clock(), seconds
        self.spent += seconds

    def written(self, seconds: float, taken: float) -> None:
        """The writer took `seconds`, of which `taken` were CPU time that training could not use."""
        self.writing = seconds
        self.latest += taken
        self.spent += taken
