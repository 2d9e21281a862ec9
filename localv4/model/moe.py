"""Mixture of experts: a few routed experts per token and one shared expert."""

import numpy as np
from numpy.typing import NDArray

from localv4.kernels import routing
from localv4.model.config import ModelConfig
from localv4.model.matrix import F32, Floats, Numerics
from localv4.model.weights import Layer, Router


class RouterBlock:
    """Chooses the experts of each token: by affinity plus bias, or by token id in hash layers."""

    def __init__(self, weights: Router, config: ModelConfig, numerics: Numerics) -> None:
        self.weights = weights
        self.config = config
        self.numerics = numerics

    def __call__(self, x: Floats, token_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], Floats]:
        """Return (experts (tokens, k), their weights (tokens, k)) for inputs x (tokens, hidden)."""
        logits = self.numerics.linear(x, self.weights.weight)
        if self.weights.table is not None:
            experts = np.ascontiguousarray(self.weights.table[token_ids])
        else:
            assert self.weights.bias is not None
            experts = np.empty((x.shape[0], self.config.experts_per_token), np.int64)
            routing.choose_experts(experts, logits, self.weights.bias)
        weights = np.empty(experts.shape, F32)
        routing.route_weights(weights, experts, logits, F32(self.config.routed_scaling))
        return experts, weights


class MoeBlock:
    """The feed-forward part of one layer."""

    def __init__(self, layer: Layer, index: int, config: ModelConfig, numerics: Numerics) -> None:
        self.router = RouterBlock(layer.router, config, numerics)
        self.shared = layer.shared
        self.experts = layer.experts
        self.limit = F32(config.swiglu_limits[index])
        self.shared_limit = F32(config.shared_swiglu_limits[index])
        self.numerics = numerics

    def __call__(self, x: Floats, token_ids: NDArray[np.int64]) -> Floats:
        """Return the output (tokens, hidden) for normed inputs x (tokens, hidden)."""
        chosen, weights = self.router(x, token_ids)
        out = self.numerics.mix_experts(x, chosen, weights, self.experts, self.limit)
        out += self.numerics.run_expert(x, self.shared, self.shared_limit)
        return out
