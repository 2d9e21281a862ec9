"""Logits on a GPU."""

from localv4.cuda.gpu import Recording
from localv4.cuda.network import GpuNetwork
from localv4.model.fast_head import HeadPlan


class GpuHeadPlan(HeadPlan):
    """As on the host; what one token needs is recorded, since a token waits for it."""

    def __init__(self, network: GpuNetwork) -> None:
        super().__init__(network)
        self._on_gpu = network
        self._recording: Recording | None = None

    def _run(self, count: int) -> None:
        if count > 1 or not self._on_gpu.is_whole:
            super()._run(count)
            return
        self._on_gpu.check_cancelled()
        if self._recording is None:
            self._recording = self._on_gpu.record(self._program(1))
        self._recording.replay()
