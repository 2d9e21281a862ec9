"""The metadata of a GGUF file: the keys of `deepseek4` and the tokenizer, from official files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from localv4.errors import BadFileError, NotFoundError
from localv4.model.config import ModelConfig
from localv4.small_file import read_small_file
from quant.gguf_writer import BOOL, F32, I32, STRING, U16, U32, key_value

ARCHITECTURE = "deepseek4"
PRE_SPLIT = "joyai-llm"
"""llama.cpp's name for the way in which this tokenizer cuts text."""

SQRT_SOFTPLUS = 4
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
MAX_TOKENIZER_BYTES = 64 << 20


def official_metadata(folder: Path, config: ModelConfig, name: str, recipe: str) -> list[bytes]:
    """Return keys with their values for the model in an official folder.

    Raises NotFoundError or BadFileError where its tokenizer is not there or damaged.
    """
    keys = [
        key_value("general.architecture", STRING, ARCHITECTURE),
        key_value("general.type", STRING, "model"),
        key_value("general.name", STRING, name),
        key_value("general.quantization_version", U32, 2),
        key_value("localv4.recipe", STRING, recipe),
    ]
    keys += [key_value(f"{ARCHITECTURE}.{key}", *value) for key, value in _network(config)]
    keys += [key_value(f"tokenizer.{key}", *value) for key, value in _tokenizer(folder, config)]
    return keys


def _network(c: ModelConfig) -> Iterator[tuple[str, tuple[int, Any]]]:
    """Yield the keys of the architecture, each with the kind and the value."""
    whole = {
        "block_count": c.n_layers,
        "context_length": c.max_positions,
        "embedding_length": c.hidden_size,
        "embedding_length_out": c.hidden_size * c.hc_mult,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.output_group_count": c.o_groups,
        "attention.output_lora_rank": c.o_lora_rank,
        "attention.sliding_window": c.window,
        "attention.indexer.head_count": c.index_heads,
        "attention.indexer.key_length": c.index_head_dim,
        "attention.indexer.top_k": c.index_top_k,
        "rope.dimension_count": c.rope_dim,
        "expert_count": c.n_experts,
        "expert_used_count": c.experts_per_token,
        "expert_shared_count": c.shared_experts,
        "expert_feed_forward_length": c.expert_width,
        "expert_gating_func": SQRT_SOFTPLUS,
        "hash_layer_count": sum(c.hashed),
        "hyper_connection.count": c.hc_mult,
        "hyper_connection.sinkhorn_iterations": c.hc_iterations,
    }
    numbers = {
        "attention.layer_norm_rms_epsilon": c.rms_eps,
        "attention.compress_rope_freq_base": c.compress_rope_theta,
        "rope.freq_base": c.rope_theta,
        "expert_weights_scale": c.routed_scaling,
        "hyper_connection.epsilon": c.hc_eps,
    }
    yield from ((key, (U32, value)) for key, value in whole.items())
    yield from ((key, (F32, value)) for key, value in numbers.items())
    yield "attention.compress_ratios", (I32, list(c.ratios))
    yield "expert_weights_norm", (BOOL, True)
    yield "swiglu_clamp_exp", (F32, list(c.swiglu_limits))
    yield "swiglu_clamp_shexp", (F32, list(c.shared_swiglu_limits))
    if c.yarn is not None:
        yield "rope.scaling.type", (STRING, "yarn")
        yield "rope.scaling.factor", (F32, c.yarn.factor)
        yield "rope.scaling.original_context_length", (U32, c.yarn.original)
        yield "rope.scaling.yarn_beta_fast", (F32, c.yarn.beta_fast)
        yield "rope.scaling.yarn_beta_slow", (F32, c.yarn.beta_slow)


def _tokenizer(folder: Path, config: ModelConfig) -> Iterator[tuple[str, tuple[int, Any]]]:
    """Yield the keys of the tokenizer."""
    path = folder / "tokenizer.json"
    document = _json(path)
    try:
        tokens, kinds = _tokens(document, config.vocab_size)
        merges = [
            pair if isinstance(pair, str) else " ".join(pair)
            for pair in document["model"]["merges"]
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadFileError(path, "is no byte-level BPE tokenizer that fits the model") from error
    yield "ggml.model", (STRING, "gpt2")
    yield "ggml.pre", (STRING, PRE_SPLIT)
    yield "ggml.tokens", (STRING, tokens)
    yield "ggml.token_type", (I32, kinds)
    yield "ggml.merges", (STRING, merges)
    yield "ggml.bos_token_id", (U32, config.bos_id)
    yield "ggml.eos_token_id", (U32, config.eos_id)
    settings = _settings(folder)
    yield "ggml.add_bos_token", (BOOL, bool(settings.get("add_bos_token", False)))
    yield "ggml.add_eos_token", (BOOL, bool(settings.get("add_eos_token", False)))
    template = settings.get("chat_template")
    if isinstance(template, str):
        yield "chat_template", (STRING, template)


def _tokens(document: Any, size: int) -> tuple[list[str], list[int]]:
    """Return the token of each id and its kind; ids without a token are unused."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [UNUSED] * size
    for text, number in document["model"]["vocab"].items():
        tokens[number], kinds[number] = text, NORMAL
    for added in document.get("added_tokens", []):
        number = added["id"]
        tokens[number] = added["content"]
        kinds[number] = CONTROL if added.get("special") else USER_DEFINED
    if len(tokens) != size or any(type(text) is not str for text in tokens):
        raise ValueError("an id beyond the vocabulary")
    return tokens, kinds


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = _json(folder / "tokenizer_config.json")
    except NotFoundError:
        return {}
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(read_small_file(path, MAX_TOKENIZER_BYTES))
    except (ValueError, RecursionError) as error:
        raise BadFileError(path, f"not JSON: {error}") from error


def split_metadata(number: int, count: int, tensors: int) -> Sequence[bytes]:
    """Return what tells which part of a model a file is."""
    return (
        key_value("split.no", U16, number),
        key_value("split.count", U16, count),
        key_value("split.tensors.count", I32, tensors),
    )
