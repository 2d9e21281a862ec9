"""One reply, made on the engine thread and watched from the main one."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from localv4.cancellation import Cancellation
from localv4.cli import worker
from localv4.cli.signals import interrupt_sets

if TYPE_CHECKING:
    from localv4.engine.engine import Engine
    from localv4.engine.growing_answer import ReplyOptions
    from localv4.engine.paging_stats import PagingStats
    from localv4.engine.reply import Reply
    from localv4.engine.session import Session
    from localv4.text.completion import Delta


BOUNDS = {"GPU": "the GPU", "host": "the host", "PCIe": "PCIe", "disk": "the disk"}
"""What can hold tokens up where a GPU helps."""


class Generation:
    """A reply in the making: how far it is, and how to stop it."""

    def __init__(
        self,
        engine: "Engine",
        session: "Session",
        prompt_ids: Sequence[int],
        options: "ReplyOptions",
        *,
        shows_paging: bool = False,
    ) -> None:
        self.shows_paging = shows_paging
        self._engine = engine
        self._session = session
        self._prompt_ids = prompt_ids
        self._options = options
        self._first_token_at: float | None = None
        self.cancelled = Cancellation()
        self.reply: Reply | None = None
        self.prefill = (0, len(prompt_ids))  # prompt tokens done, and all of them
        self.tokens = 0

    def deltas(self) -> "Iterator[Delta | None]":
        """Yield the pieces of the reply, and None now and then while there is nothing new.

        The first Ctrl-C ends the reply early; a second one raises KeyboardInterrupt.
        """
        with interrupt_sets(self.cancelled):
            yield from worker.stream(self._run)

    @property
    def is_reading(self) -> bool:
        """Whether the prompt is still being read."""
        return self.tokens == 0

    @property
    def tokens_per_s(self) -> float:
        """Speed of the answer so far; 0 before there are two tokens."""
        if self._first_token_at is None or self.tokens < 2:
            return 0.0
        return (self.tokens - 1) / max(time.monotonic() - self._first_token_at, 1e-9)

    def live_paging(self) -> "PagingStats | None":
        """Return what paging costs so far, if that is to be shown."""
        if not self.shows_paging or self.reply is None:
            return None
        return self.reply.stats.paging

    def finished(self) -> "Reply":
        """Return the reply after `deltas` has ended."""
        assert self.reply is not None
        return self.reply

    def _run(self) -> "Iterator[Delta]":
        self.reply = reply = self._engine.reply(
            self._session,
            self._prompt_ids,
            self._options,
            on_prefill=self._note_prefill,
            cancelled=self.cancelled,
        )
        for delta in reply:
            self.tokens = len(reply.token_ids)
            if self._first_token_at is None:
                self._first_token_at = time.monotonic()
            yield delta
        self.tokens = len(reply.token_ids)

    def _note_prefill(self, done: int, total: int) -> None:
        self.prefill = (done, total)


def stats_line(reply: "Reply") -> str:
    """Return speed and memory of a finished reply on one line."""
    from localv4.engine.machine import peak_resident_bytes

    stats = reply.stats
    read = stats.prompt_tokens - stats.reused_tokens
    prompt = f"prompt {read} tok, {stats.prefill_tok_s:.1f} tok/s"
    if stats.reused_tokens:
        prompt += f" (+{stats.reused_tokens} reused)"
    answer = f"gen {stats.generated_tokens} tok, {stats.decode_tok_s:.1f} tok/s"
    return f"{prompt} | {answer} | peak RSS {format_bytes(peak_resident_bytes())}"


def paging_lines(reply: "Reply") -> list[str]:
    """Return what paging cost a finished reply; nothing where experts are not paged."""
    from localv4.engine.paging_stats import bound_of, spread

    paging = reply.stats.paging
    if paging is None or not paging.counts.tokens:
        return []
    counts, reads, rates = paging.counts, paging.reads, paging.layer_hit_rates
    low, high = spread(rates)
    demand, guess = (paging.per_token(counts.bytes[reason]) / 1e9 for reason in ("demand", "guess"))
    wait_s = paging.per_token(counts.wait_s)
    bound = bound_of(reply.stats.decode_s, counts.wait_s, None)
    room = f"{format_bytes(paging.resident_bytes)} of {format_bytes(paging.capacity_bytes)}"
    lines = [
        f"experts {room} | hits {paging.hit_rate:.1%} "
        f"(layer {low}: {rates[low]:.0%} ... layer {high}: {rates[high]:.0%}) | "
        f"{paging.per_token(float(counts.misses.sum())):.1f} misses per token",
        f"read {demand:.3f} GB per token, {guess:.3f} GB guessed | waited {1e3 * wait_s:.0f} ms "
        f"per token | bound by {bound}",
    ]
    if counts.guesses:
        lines[1] += f" | {counts.guesses_used / counts.guesses:.0%} of guesses used"
    if reads.reads:
        lines.append(
            f"disk {reads.bytes_s / 1e9:.2f} GB/s, {reads.mean_depth:.1f} reads at a time, "
            f"{1e3 * reads.p50_s:.1f} ms each (p99 {1e3 * reads.p99_s:.1f}), "
            f"{reads.core_s_per_gb:.2f} core-s per GB"
        )
    return lines


def gpu_lines(reply: "Reply") -> list[str]:
    """Return what a GPU did for a finished reply; nothing where none helps."""
    gpu = reply.stats.gpu
    if gpu is None or not gpu.counts.tokens:
        return []
    shares = gpu.tiers.shares()
    where = " | ".join(
        f"{shares[tier]:.1%} {what}"
        for tier, what in (("gpu", "on the GPU"), ("memory", "in memory"), ("disk", "on disk"))
    )
    seconds = reply.stats.decode_s
    layers = "" if gpu.layers == gpu.all_layers else f" | layers 0 to {gpu.layers - 1}"
    return [
        f"{gpu.name}: {format_bytes(gpu.used_bytes)} of {format_bytes(gpu.total_bytes)}{layers} | "
        f"experts {where}",
        f"host {1e3 * gpu.per_token(gpu.counts.host_s):.1f} ms per token | "
        f"{gpu.per_token(gpu.promotions):.2f} experts promoted, "
        f"{gpu.per_token(gpu.uploaded_bytes) / 1e9:.3f} GB uploaded per token | "
        f"bound by {BOUNDS[gpu.bound(seconds)]}",
    ]


def format_bytes(count: int) -> str:
    """Write a number of bytes with three digits: 25.5 MB is `24.3 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB" if value < 1000 else f"{value / 1024:.2f} TiB"
