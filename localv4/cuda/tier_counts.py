"""What the tiers of memory did for decoded tokens."""

from localv4.paging.counts import PagingCounts


class TierCounts(PagingCounts):
    """Sums of a store on a GPU.

    `misses` counts records that a token used and the GPU lacked: the host computed them, or layers
    of several tokens waited for them. Records read as `warm` were promoted: they came to the GPU
    because tokens keep choosing them. `host_s` is the time that the host took for its part of
    tokens, what it waited for its disk included; the GPU worked meanwhile.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.host_s = 0.0
