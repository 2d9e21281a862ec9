#!/usr/bin/env python3
"""The process in which measure_batch.py times llama.cpp: several sequences, a token of each a step.

It imports nothing of localv4, since another interpreter runs it: one that has llama-cpp-python. The
model, the threads and the depth are arguments. A request is a line of JSON on stdin with "tokens",
a list for each step with a token for each row; the answer is a line with the "seconds" of the steps
after the first.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

FILLER = 7  # a token that is in every vocabulary


class Peer:
    """A model of llama.cpp and one context, made anew when the number of rows changes."""

    def __init__(self, path: str, threads: int, depth: int) -> None:
        self.llama: Any = importlib.import_module("llama_cpp").llama_cpp
        self.threads, self.depth = threads, depth
        self.llama.llama_backend_init()
        params = self.llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.context: Any = None
        self.rows = 0

    def time(self, tokens: list[list[int]]) -> float:
        """Decode steps of a token for each row; return the seconds of all but the first."""
        self._bring_to_depth(len(tokens[0]), len(tokens))
        start = 0.0
        for step, row_tokens in enumerate(tokens):
            if step == 1:
                start = time.perf_counter()
            position = self.depth + step
            self._decode([(token, position, row) for row, token in enumerate(row_tokens)], True)
        return time.perf_counter() - start

    def _bring_to_depth(self, rows: int, steps: int) -> None:
        """Fill every sequence up to the depth; what an earlier call added to them goes."""
        memory = self.llama.llama_get_memory
        if self.context and self.rows == rows:
            if all(
                self.llama.llama_memory_seq_rm(memory(self.context), row, self.depth, -1)
                for row in range(rows)
            ):
                return
            self.llama.llama_memory_clear(memory(self.context), True)
        else:
            self._make_context(rows, steps)
        for row in range(rows):
            self._decode([(FILLER + row, place, row) for place in range(self.depth)], False)

    def _make_context(self, rows: int, steps: int) -> None:
        if self.context:
            self.llama.llama_free(self.context)
        params = self.llama.llama_context_default_params()
        params.n_seq_max = rows
        params.n_ctx = rows * (self.depth + steps + 256)
        params.n_batch = params.n_ubatch = max(rows, self.depth, 32)
        params.n_threads = params.n_threads_batch = self.threads
        params.offload_kqv = False
        self.context = self.llama.llama_init_from_model(self.model, params)
        self.rows = rows
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context for {rows} sequences")

    def _decode(self, entries: list[tuple[int, int, int]], wants_logits: bool) -> None:
        """Process (token, position, sequence) entries together."""
        batch = self.llama.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for index, (token, position, row) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.logits[index] = wants_logits
        code = self.llama.llama_decode(self.context, batch)
        self.llama.llama_synchronize(self.context)
        self.llama.llama_batch_free(batch)
        if code != 0:
            raise SystemExit(f"llama_decode returned {code}")


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints must not come between the answers
    peer = Peer(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    for line in sys.stdin:
        seconds = peer.time(json.loads(line)["tokens"])
        answers.write(json.dumps({"seconds": seconds}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
