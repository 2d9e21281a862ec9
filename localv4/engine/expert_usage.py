"""Which experts earlier sessions used: read ahead at the start, kept at the end."""

from localv4.engine.fingerprint import weights_fingerprint
from localv4.errors import LocalV4Error
from localv4.paging.paged_store import PagedStore
from localv4.paging.policy import DecayedFrequency
from localv4.paging.topics import TopicMemory
from localv4.paging.usage_file import Usage, load_usage, save_usage, usage_path
from localv4.storage import Checkpoint

LEAST_TOKENS = 64
"""Fewer decoded tokens say nothing of what the next session will need."""


class ExpertUsage:
    """The usage of one model's experts, from session to session.

    `warning` is why what was kept could not be read; it is replaced then.
    """

    def __init__(self, store: PagedStore, checkpoint: Checkpoint) -> None:
        self._store = store
        self._fingerprint = weights_fingerprint(checkpoint)
        self._memory = TopicMemory()
        if isinstance(store.policy, DecayedFrequency):
            self._memory = store.policy.memory
        self.warning: str | None = None

    def begin(self) -> None:
        """Count on from the last session, and have its hottest experts read meanwhile."""
        store = self._store
        shape = (store.addresses.shape[0], store.addresses.shape[1])
        try:
            known = load_usage(usage_path(self._fingerprint), self._fingerprint, shape)
        except LocalV4Error as error:
            self.warning = f"{error}: it is replaced"
            return
        if known is not None:
            known.begin(store.uses, self._memory)
            store.warm(known.hottest(store.nbytes, store.arena.capacity - store.arena.used))

    def keep(self) -> None:
        """Write down what was used, for the next session; a disk that is full is no failure."""
        if self._store.counts.tokens < LEAST_TOKENS:
            return
        usage = Usage.of(self._store.uses, self._memory)
        try:
            save_usage(usage_path(self._fingerprint), self._fingerprint, usage)
        except (LocalV4Error, OSError):
            return
