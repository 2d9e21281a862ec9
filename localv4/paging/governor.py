"""Gives memory back when the computer runs short of it, and takes it again when that is over."""

import threading
from collections.abc import Callable

from localv4.paging.pressure import Gauge, Pressure

LOOK_EVERY_S = 2.0
STEP_SHARE = 0.05
"""Share of the budget that is given back or taken again at a time."""

MOST_STALLED = 0.05
AMPLE_BYTES = 8 << 30
"""With so much available, programs that wait for memory do so while it is tidied up: cached files
are dropped and large pages put together for an arena that fills. No lack of it stands behind."""

MOST_SWAPPED_IN_S = 1 << 20
LEAST_AVAILABLE = 256 << 20

CALM_LOOKS = 15
"""Looks without pressure before memory is taken again: half a minute."""

MOST_CALM_LOOKS = 300
"""The same after it proved too early several times: ten minutes."""

GROWING_LOOKS = 5
"""Looks between one step and the next while memory is taken again."""


def is_pressed(pressure: Pressure) -> bool:
    """Say whether somebody suffers from a lack of memory."""
    return (
        (pressure.stalled > MOST_STALLED and pressure.available < AMPLE_BYTES)
        or pressure.swapped_in_s > MOST_SWAPPED_IN_S
        or pressure.is_warned
        or pressure.available < LEAST_AVAILABLE
    )


class Governor:
    """Holds a budget within what the computer can spare.

    `shrink(nbytes)` and `grow(nbytes)` are asked to change it and return by how many bytes they
    did; they are called by a thread of the governor, one at a time. The budget stays between
    `least` and `budget`. Each look under pressure takes one step down. A step up needs calm for
    CALM_LOOKS, twice as long each time that it was followed by pressure, and room for two steps.
    """

    def __init__(
        self,
        budget: int,
        least: int,
        shrink: Callable[[int], int],
        grow: Callable[[int], int],
        gauge: Gauge,
    ) -> None:
        self.budget, self.least = budget, least
        self.held = budget
        self.pressure = Pressure(0.0, 0.0, False, 0)
        self.failure: Exception | None = None
        self._shrink, self._grow, self._gauge = shrink, grow, gauge
        self._step = max(1, int(budget * STEP_SHARE))
        self._calm = 0
        self._calm_needed = CALM_LOOKS
        self._grown_lately = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Read the pressure once and do what it asks for."""
        self.pressure = self._gauge.read()
        if is_pressed(self.pressure):
            self._under_pressure()
        else:
            self._in_calm()

    def start(self, every_s: float = LOOK_EVERY_S) -> None:
        """Look now and then, in a thread, until `close`. An error ends that; `failure` keeps it."""
        self._thread = threading.Thread(
            target=self._keep_looking, args=(every_s,), name="memory-governor", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the thread; nothing is asked for after that."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _keep_looking(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            try:
                self.look()
            except Exception as error:
                self.failure = error
                return

    def _under_pressure(self) -> None:
        self._calm = 0
        if self._grown_lately:
            self._calm_needed = min(2 * self._calm_needed, MOST_CALM_LOOKS)
            self._grown_lately = False
        step = min(self._step, self.held - self.least)
        if step > 0:
            self.held -= self._shrink(step)

    def _in_calm(self) -> None:
        self._calm += 1
        if self._calm == 2 * self._calm_needed and self.held == self.budget:
            self._grown_lately, self._calm_needed = False, CALM_LOOKS
        step = min(self._step, self.budget - self.held)
        if step <= 0 or self._calm < self._calm_needed:
            return
        if self.pressure.available < 2 * step + LEAST_AVAILABLE:
            return
        self.held += self._grow(step)
        self._grown_lately = True
        self._calm = self._calm_needed - GROWING_LOOKS
