"""How often a run is saved, where the configuration leaves that to time."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_SECONDS = 300.0  # at least so long between two saves
SHARE = 0.02  # of a run's time that saves may take
FREE_SECONDS = 1.0  # saves as short as this are not counted


class Pace:
    """Saves at least five minutes apart, that take no more than a fiftieth of the run so far.

    minutes: the configured time between two, whatever they take. Nothing but which steps are
    saved may depend on it.
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
        return since >= FIRST_SECONDS and self.affordable(busy)

    def affordable(self, busy: bool) -> bool:
        """Whether a save now, at the price of the latest, keeps to the share."""
        price = self.latest + (self.writing if busy else 0.0)
        allowed = SHARE * (self.clock() - self.began)
        return price <= FREE_SECONDS or self.spent + price <= allowed

    def stopped(self, seconds: float) -> None:
        """The loop stood still for a save so long, just now."""
        self.last, self.latest = self.clock(), seconds
        self.spent += seconds

    def written(self, seconds: float, taken: float) -> None:
        """The writer worked so long, and took so many seconds of the run's own computation."""
        self.writing = seconds
        self.latest += taken
        self.spent += taken
