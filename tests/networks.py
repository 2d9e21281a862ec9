"""Open a written model as a network, without a tokenizer."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from golden_files import load_golden, write_stored
from numpy.typing import NDArray

from localv4.engine.session import Network, Session
from localv4.kernels.team import Team
from localv4.model.loading import read_model_config
from localv4.model.matrix import Numerics
from localv4.model.names import official_names
from localv4.model.transformer import Transformer
from localv4.model.weights import load_weights
from localv4.storage import open_checkpoint

CONTEXT = 1 << 20


def open_network(path: Path, threads: int = 2) -> Transformer:
    """Open the checkpoint at `path`."""
    checkpoint = open_checkpoint(path)
    table = official_names(checkpoint)
    config = read_model_config(checkpoint, table)
    weights = load_weights(checkpoint, table, config)
    return Transformer(config, weights, Numerics(Team(threads), weights.widest))


def wide_network(folder: Path) -> Transformer:
    """Return a small network with all kinds of layers, in official storage, exact."""
    return open_network(write_stored(load_golden("wide"), folder))


def logits(
    network: Network, ids: list[int], chunks: Iterable[int] = (1 << 30,)
) -> NDArray[np.float32]:
    """Return the logits after every token; `chunks` are cycled until the tokens are used up."""
    session, rows, start = Session(network, CONTEXT), [], 0
    sizes = list(chunks)
    while start < len(ids):
        size = sizes[len(rows) % len(sizes)]
        rows.append(session.all_logits(ids[start : start + size]))
        start += size
    return np.concatenate(rows)
