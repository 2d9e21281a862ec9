"""Hyper-connections: a block reads a mix of N residual streams and writes back into all of them."""

from dataclasses import dataclass

import numpy as np

from localv4.kernels import hyper
from localv4.model.config import ModelConfig
from localv4.model.matrix import F32, Floats, Numerics
from localv4.model.norm import rms_norm
from localv4.model.weights import HyperConnection


@dataclass(frozen=True, slots=True)
class Mix:
    """How a block's output joins the streams: post (tokens, n), comb (tokens, n, n)."""

    post: Floats
    comb: Floats


class HyperConnectionSite:
    """The connection around one attention or feed-forward block."""

    def __init__(self, weights: HyperConnection, config: ModelConfig, numerics: Numerics) -> None:
        self.weights = weights
        self.config = config
        self.numerics = numerics

    def enter(self, streams: Floats) -> tuple[Floats, Mix]:
        """Collapse streams (tokens, n, hidden) into the block's input (tokens, hidden)."""
        tokens, n, _ = streams.shape
        pre, post = np.empty((tokens, n), F32), np.empty((tokens, n), F32)
        comb = np.empty((tokens, n, n), F32)
        hyper.split_mixes(
            pre,
            post,
            comb,
            self._mixes(streams),
            self.weights.scale,
            self.weights.base,
            self.config.hc_iterations,
            F32(self.config.hc_eps),
        )
        return _collapse(streams, pre), Mix(post, comb)

    def leave(self, streams: Floats, update: Floats, mix: Mix) -> Floats:
        """Return the streams after the block has produced `update` (tokens, hidden)."""
        out = np.empty_like(streams)
        hyper.expand(out, mix.post, mix.comb, update, streams)
        return out

    def collapse_head(self, streams: Floats) -> Floats:
        """Collapse the streams after the last block into one vector per token (tokens, hidden)."""
        mixes = self._mixes(streams)
        pre = np.empty_like(mixes)
        hyper.head_mixes(pre, mixes, self.weights.scale, self.weights.base, F32(self.config.hc_eps))
        return _collapse(streams, pre)

    def _mixes(self, streams: Floats) -> Floats:
        flat = streams.reshape(streams.shape[0], -1)
        return self.numerics.linear(rms_norm(flat, None, self.config.rms_eps), self.weights.fn)


def _collapse(streams: Floats, pre: Floats) -> Floats:
    out = np.empty((streams.shape[0], streams.shape[2]), F32)
    hyper.collapse(out, pre, streams)
    return out
