"""Records which experts tokens choose, while they are processed."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localv4.engine.fingerprint import weights_fingerprint
from localv4.errors import UsageError
from localv4.model.fast import FastTransformer
from localv4.paging.trace import TraceHead, TraceWriter
from localv4.storage import Checkpoint


def record_routes(network: object, checkpoint: Checkpoint, name: str, path: Path) -> TraceWriter:
    """Write the routes of all further tokens of a network to a file; it is the caller's to close.

    Raises UsageError for a network whose experts are not packed, LocalV4Error for the file.
    """
    if not isinstance(network, FastTransformer):
        raise UsageError("--trace-routes needs --numerics fast")
    config, nbytes = network.config, network.record_bytes
    head = TraceHead(
        fingerprint=weights_fingerprint(checkpoint),
        model=name,
        layers=config.n_layers,
        experts=config.n_experts,
        k=config.experts_per_token,
        record_bytes=tuple(int(size) for size in nbytes.max(1)),
    )
    writer = TraceWriter(path, head)

    def note(chosen: NDArray[np.integer], is_prompt: bool) -> None:
        writer.append(chosen, is_prompt)

    network.on_routes = note
    return writer
