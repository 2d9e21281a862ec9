"""The output matrix as a program: logits of final vectors."""

import numpy as np

from localv4.model.fast_network import FastNetwork
from localv4.model.matrix import F32, Floats
from localv4.model.program import Input, Program, Rounded, Rows

HEAD_TOKENS = 32
"""Tokens whose logits are computed together."""


class HeadPlan:
    """Computes logits of up to HEAD_TOKENS tokens at a time; one has buffers of its own."""

    def __init__(self, network: FastNetwork) -> None:
        self._network = network
        self._vectors = Rows(HEAD_TOKENS, network.config.hidden_size)
        self._rounded = Rounded(HEAD_TOKENS, network.config.hidden_size)
        self._one = Rows(1, network.config.vocab_size)
        self._many: Rows | None = None
        network.adopt(self._vectors, self._rounded, self._one)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        parts = (self._vectors, self._rounded, self._one, self._many)
        return sum(part.nbytes for part in parts if part is not None)

    def logits(self, vectors: Floats) -> Floats:
        """Return logits (tokens, vocab) for final vectors (tokens, hidden)."""
        out = np.empty((len(vectors), self._network.config.vocab_size), F32)
        for first in range(0, len(vectors), HEAD_TOKENS):
            part = slice(first, min(first + HEAD_TOKENS, len(vectors)))
            out[part] = self._multiply(vectors[part])
        return out

    def _multiply(self, vectors: Floats) -> Floats:
        """Return the logits of up to HEAD_TOKENS tokens, until the next call."""
        network, count = self._network, len(vectors)
        logits = self._logits(count)
        self._vectors.values[:count] = vectors
        network.publish(self._vectors.values[:count])
        self._run(count)
        network.fetch(logits.values[:count])
        return logits.values[:count]

    def _logits(self, count: int) -> Rows:
        """Return room for the logits of so many tokens."""
        if count == 1:
            return self._one
        if self._many is None:
            self._many = Rows(HEAD_TOKENS, self._network.config.vocab_size)
            self._network.adopt(self._many)
        return self._many

    def _run(self, count: int) -> None:
        self._network.run(self._program(count))

    def _program(self, count: int) -> Program:
        network, program = self._network, self._network.new_program()
        program.round(self._rounded, self._vectors, count)
        inputs = Input(self._vectors, self._rounded)
        program.multiply(self._logits(count), network.weights.head, inputs, count)
        return program
