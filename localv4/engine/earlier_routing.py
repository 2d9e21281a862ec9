"""What is known of the experts that a model chooses: its own runs, or a trace of one."""

from contextlib import suppress
from pathlib import Path

from localv4.engine.fingerprint import weights_fingerprint
from localv4.errors import LocalV4Error, UsageError
from localv4.model.config import ModelConfig
from localv4.paging.trace import read_trace
from localv4.paging.usage_file import load_usage, usage_path
from localv4.planning.hit_rate import Routing, SeveralTopics
from localv4.planning.traced_routing import TracedRouting
from localv4.storage import open_checkpoint


def earlier_routing(path: Path, config: ModelConfig) -> Routing | None:
    """Return what earlier sessions with a model that is here have counted; None if nothing was.

    A record of use that cannot be read is as good as none: the next session replaces it.
    """
    with suppress(LocalV4Error, OSError, ValueError), open_checkpoint(path) as checkpoint:
        fingerprint = weights_fingerprint(checkpoint)
        shape = (config.n_layers, config.n_experts)
        usage = load_usage(usage_path(fingerprint), fingerprint, shape)
        if usage is not None:
            return SeveralTopics([usage.scores, *usage.topics])
    return None


def traced_routing(path: Path, config: ModelConfig) -> Routing:
    """Return what a recorded trace tells of a model.

    Raises UsageError for one of another network or too short, LocalV4Error for the file.
    """
    trace = read_trace(path)
    head = trace.head
    if (head.layers, head.experts, head.k) != (
        config.n_layers,
        config.n_experts,
        config.experts_per_token,
    ):
        raise UsageError(
            f"{path} is of a network with {head.k} of {head.experts} experts in {head.layers} "
            f"layers, this one uses {config.experts_per_token} of {config.n_experts} in "
            f"{config.n_layers}"
        )
    return TracedRouting(trace)
