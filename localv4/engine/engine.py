"""A loaded model: opened files, network and tokenizer, ready for sessions."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from functools import cached_property
from pathlib import Path

from localv4.engine.devices import Computing, Wanted, find_device, make_network
from localv4.engine.expert_usage import ExpertUsage
from localv4.engine.growing_answer import ReplyOptions
from localv4.engine.memory import (
    check_ctx_size,
    paging_options,
    plan_memory,
    row_memory,
    with_rows,
)
from localv4.engine.reply import Reply
from localv4.engine.session import Network, Progress, Session
from localv4.engine.setup import Setup
from localv4.errors import BadFileError, UsageError
from localv4.kernels.compiler import EXACT, are_compiled, compile_kernels
from localv4.kernels.team import Team
from localv4.kernels.threads import default_threads, most_threads
from localv4.model.config import ModelConfig
from localv4.model.fast import FastTransformer, can_run
from localv4.model.loading import read_model_config, read_names, read_weights
from localv4.model.matrix import Floats, Numerics
from localv4.model.packing import families, pack_dense
from localv4.model.transformer import Transformer
from localv4.model.weights import Weights
from localv4.paging.options import PagingOptions
from localv4.paging.paged_store import PagedStore
from localv4.paging.row_memory import RowMemory
from localv4.planning.gpu_plan import GpuPlan
from localv4.planning.header_facts import facts_of_tensors
from localv4.planning.model_facts import ModelFacts
from localv4.planning.plan import Plan
from localv4.storage import Checkpoint, PackedFolder, open_checkpoint
from localv4.text.tokenizer import Tokenizer

COMPILING = "compiling kernels (first run only)"
"""The phase of loading that takes a minute, once."""

COMPILING_FOR_GPU = "compiling kernels for the GPU (first run only)"

HEADS_TOKENS = 128
"""Tokens that are processed together where the logits of all of them are wanted."""

MOST_HEADS_TOKENS = 256
"""The same on demand: bounds the memory for logits."""

OnLoad = Callable[[str, int, int], None]
"""Called with (phase, done, total) while kernels compile and weights are found."""


class Engine:
    """One model on one machine. Weights stay in the files, mapped into memory and shared."""

    facts: ModelFacts | None = None
    plan: Plan | None = None
    gpu_plan: GpuPlan | None = None
    _gpu_note: str | None = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        network: Network,
        ctx_size: int,
        memory: RowMemory | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        self.network = network
        if memory is not None:
            network.row_memory = memory
        self.config: ModelConfig = network.config
        self.ctx_size = ctx_size
        self._usage: ExpertUsage | None = None

    @classmethod
    def load(
        cls, path: Path, setup: Setup | None = None, *, on_progress: OnLoad | None = None
    ) -> "Engine":
        """Open the model at `path` (a checkpoint folder or a GGUF file).

        Networks of dimensions that the kernels of "fast" do not know are computed in "exact"
        (`network.name` tells). Raises NotFoundError, BadFileError, UsageError or DoesNotFitError.
        """
        setup = setup or Setup()
        checkpoint = open_checkpoint(path)
        table = read_names(checkpoint)
        config = read_model_config(checkpoint, table)
        size = _checked_ctx_size(setup.ctx_size, config)
        threads = _checked_threads(setup.threads)
        weights = read_weights(checkpoint, table, config, _phase(on_progress, "opening weights"))
        if setup.numerics == "fast" and can_run(config):
            rows = row_memory(setup.memory)
            facts = facts_of_tensors(checkpoint, table, config, name=checkpoint.path.name)
            facts = with_rows(facts, setup.memory)
            plan = plan_memory(facts, setup.memory, setup.ctx_size, threads)
            computing = _computing(checkpoint, weights, facts, plan, setup, threads, on_progress)
            engine = cls(checkpoint, computing.network, size, rows)
            engine.facts, engine.plan = facts, plan
            engine.gpu_plan, engine._gpu_note = computing.gpu, computing.note
            engine._begin_usage()
            return engine
        _check_exact(checkpoint, setup)
        _make_kernels({EXACT}, on_progress)
        exact = Numerics(Team(threads, setup.pin), weights.widest)
        network = Transformer(config, weights, exact)
        return cls(checkpoint, network, size, row_memory(setup.memory))

    def _begin_usage(self) -> None:
        store = self.network.host_store if isinstance(self.network, FastTransformer) else None
        if isinstance(store, PagedStore) and store.pages:
            self._usage = ExpertUsage(store, self.checkpoint)
            self._usage.begin()
            weakref.finalize(self, self._usage.keep)  # at the end of the process at the latest

    @property
    def notes(self) -> list[str]:
        """What the user should know of how the model was loaded and runs now, a line each."""
        store = self.network.host_store if isinstance(self.network, FastTransformer) else None
        refusal = store.refusal if isinstance(store, PagedStore) else None
        warning = self._usage.warning if self._usage is not None else None
        left = getattr(self.network, "warning", None)  # a GPU that has no memory left
        return [line for line in (self._gpu_note, refusal, warning, left) if line is not None]

    def memory(self) -> dict[str, int]:
        """Return the bytes held by component, but for sessions and mapped files."""
        return self.network.memory()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises NotFoundError or BadFileError when it has none."""
        if self.checkpoint.metadata:
            tokenizer = Tokenizer.from_gguf(self.checkpoint.metadata, self.path)
        else:
            folder = self.path if self.path.is_dir() else self.path.parent
            tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        if tokenizer.vocab_size > self.config.vocab_size:
            raise BadFileError(
                tokenizer.path,
                f"tokenizer has {tokenizer.vocab_size} tokens, the model {self.config.vocab_size}",
            )
        return tokenizer

    def new_session(self) -> Session:
        """Return an empty timeline."""
        return Session(self.network, self.ctx_size)

    def reply(
        self,
        session: Session,
        prompt_ids: Sequence[int],
        options: ReplyOptions,
        *,
        on_prefill: Progress | None = None,
        cancelled: threading.Event | None = None,
    ) -> Reply:
        """Return the answer to a prompt, to be iterated; what the session shares is reused.

        Raises DoesNotFitError when the prompt fills the context, UsageError for bad options,
        BadFileError when the model's files changed under us.
        """
        self.checkpoint.check_unchanged()
        return Reply(
            session,
            self.tokenizer,
            prompt_ids,
            options,
            on_prefill,
            cancelled,
            self.checkpoint.check_unchanged,
        )

    def logits(
        self,
        token_ids: Sequence[int],
        chunk: int | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Floats]:
        """Yield the logits after every token, as arrays (some tokens, vocab) in order.

        `chunk` tokens are processed at a time, at most MOST_HEADS_TOKENS; 1 decodes token by token.
        """
        self.checkpoint.check_unchanged()
        session = self.new_session()
        size = min(chunk or HEADS_TOKENS, MOST_HEADS_TOKENS)
        for start in range(0, len(token_ids), size):
            part = token_ids[start : start + size]
            rows = session.all_logits(part, chunk=size)
            self.checkpoint.check_unchanged()
            yield rows
            if on_progress is not None:
                on_progress(start + len(part), len(token_ids))


def _computing(
    checkpoint: Checkpoint,
    weights: Weights,
    facts: ModelFacts,
    plan: Plan,
    setup: Setup,
    threads: int,
    on_progress: OnLoad | None,
) -> Computing:
    """Make the network of packed weights on its device, with memory as planned."""
    device = find_device(setup.gpu, facts, plan.ctx_size)
    _make_kernels(families(weights) | {facts.rows.family}, on_progress)
    paging = paging_options(checkpoint, setup.memory, plan)
    wanted = Wanted(
        checkpoint=checkpoint,
        config=facts.config,
        weights=_packed(checkpoint, weights, threads, paging, on_progress),
        threads=threads,
        pin=setup.pin,
        paging=paging,
        rows=facts.rows,
        device=device,
    )
    return make_network(wanted, _phase(on_progress, COMPILING_FOR_GPU))


def _check_exact(checkpoint: Checkpoint, setup: Setup) -> None:
    """Raise UsageError for what only the arithmetic `fast` can do."""
    if isinstance(checkpoint, PackedFolder):
        raise UsageError(
            f"{checkpoint.path} is packed for --numerics fast and has no weights for exact",
            hint="use the model that it was made from, or another way than exact",
        )
    if setup.memory.kv not in (None, "f32"):
        raise UsageError(
            f"--kv {setup.memory.kv} needs --numerics fast, and dimensions that it can compute",
            hint="leave --kv out: exact keeps float32",
        )
    if setup.gpu.name == "cuda":
        raise UsageError(
            "--device cuda needs --numerics fast, and dimensions that it can compute",
            hint="leave --device out: exact is computed by the CPU",
        )


def _packed(
    checkpoint: Checkpoint,
    weights: Weights,
    threads: int,
    paging: PagingOptions,
    on_progress: OnLoad | None,
) -> Weights:
    """Bring the dense weights into memory as planned."""

    def packed(done: int, total: int) -> None:
        checkpoint.drop_pages()  # what was copied out of the files need not be there twice
        if on_progress is not None:
            on_progress("packing weights", done, total)

    weights = pack_dense(weights, threads, packed, copies=paging.io != "map")
    checkpoint.drop_pages()
    return weights


def _make_kernels(families: Set[str], on_progress: OnLoad | None) -> None:
    phase = "loading kernels" if are_compiled(families) else COMPILING
    compile_kernels(families, _phase(on_progress, phase))


def _phase(on_progress: OnLoad | None, phase: str) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(phase, done, total)


def _checked_ctx_size(ctx_size: int | None, config: ModelConfig) -> int:
    if ctx_size is None:
        return config.max_positions
    check_ctx_size(ctx_size, config)
    return ctx_size


def _checked_threads(threads: int | None) -> int:
    most = most_threads()
    if threads is None:
        return default_threads()
    if not 1 <= threads <= most:
        raise UsageError(f"--threads is {threads}, expected 1 to {most}")
    return threads
