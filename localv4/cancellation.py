"""The wish that work ends: an event that also reaches who computes, and cannot look at it."""

import threading
from collections.abc import Callable


class Cancellation(threading.Event):
    """An event whose `listener`, if there is one, is called when it is set.

    It may be called from a signal handler at any moment, so it must be quick and never wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listener: Callable[[], None] | None = None

    def set(self) -> None:
        """Set the event, then tell the listener."""
        super().set()
        listener = self.listener
        if listener is not None:
            listener()
