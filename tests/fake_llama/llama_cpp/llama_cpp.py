"""The low-level calls: tokens are kept, and the logits depend on all of them and their order."""

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VOCAB_SIZE = 300
SETTINGS = json.loads(os.environ.get("FAKE_LLAMA", "{}"))
TROUBLE = SETTINGS.get("trouble", "")
ERROR, INFO, CONTINUED = 4, 2, 5

llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_log: Any = None
_decoded = 0


class llama_batch(SimpleNamespace):
    """Pointers to the tokens of a batch."""


def llama_log_set(callback: Any, _user: Any) -> None:
    global _log
    _log = callback


def llama_backend_init() -> None:
    os.write(1, b"the library writes to stdout\n")


def llama_print_system_info() -> bytes:
    return b"CPU : FAKE = 1 | REAL = 0 | "


def llama_model_default_params() -> Any:
    return SimpleNamespace(n_gpu_layers=99, use_extra_bufts=True)


def llama_model_load_from_file(path: bytes, params: Any) -> Any:
    assert params.n_gpu_layers == 0
    if TROUBLE == "bad file":
        _log(ERROR, b"llama_model_load: error loading model: ", None)
        _log(CONTINUED, b"no such\ntensor\n", None)
        return None
    return SimpleNamespace(path=path, params=params)


def llama_model_desc(_model: Any, text: Any, _size: int) -> int:
    text.value = b"fake 1B"
    return 7


def llama_model_size(_model: Any) -> int:
    return 1000


def llama_model_get_vocab(model: Any) -> Any:
    return model


def llama_vocab_n_tokens(_vocabulary: Any) -> int:
    return VOCAB_SIZE


def llama_context_default_params() -> Any:
    return SimpleNamespace()


def llama_init_from_model(model: Any, params: Any) -> Any:
    if TROUBLE == "no context":
        return None
    if params.flash_attn_type == -1:
        _log(INFO, b"sched_reserve: Flash Attention enabled\n", None)
    return SimpleNamespace(model=model, params=params, tokens=[], logits=None)


def llama_free(context: Any) -> None:
    context.tokens = None


def llama_n_ctx(context: Any) -> int:
    return int(context.params.n_ctx)


def llama_n_batch(context: Any) -> int:
    return int(context.params.n_batch)


def llama_n_ubatch(context: Any) -> int:
    return int(context.params.n_ubatch)


def llama_get_memory(context: Any) -> Any:
    return context


def llama_memory_clear(memory: Any, _data: bool) -> None:
    memory.tokens = []


def llama_state_seq_get_size(context: Any, _sequence: int) -> int:
    return 2 * len(context.tokens)


def llama_state_seq_get_data(context: Any, out: Any, size: int, _sequence: int) -> int:
    if TROUBLE == "no state":
        return 0
    for index, token in enumerate(context.tokens):
        out[2 * index], out[2 * index + 1] = token % 256, token // 256
    return size


def llama_state_seq_set_data(context: Any, data: Any, size: int, _sequence: int) -> int:
    context.tokens = [data[at] + 256 * data[at + 1] for at in range(0, size, 2)]
    return size


def llama_decode(context: Any, batch: Any) -> int:
    global _decoded
    count = batch.n_tokens
    assert count <= context.params.n_batch
    for index in range(count):
        assert batch.pos[index] == len(context.tokens)
        assert (batch.n_seq_id[index], batch.seq_id[index][0]) == (1, 0)
        context.tokens.append(batch.token[index])
    wanted = [index for index in range(count) if batch.logits[index]]
    if "log" in SETTINGS:
        with Path(SETTINGS["log"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps([batch.pos[0], count, wanted]) + "\n")
    context.logits = _logits(context.tokens) if wanted else None
    _decoded += 1
    return _stumble()


def _stumble() -> int:
    if TROUBLE == "crash":
        sys.stderr.write("ggml.c:1: GGML_ASSERT(fine) failed\nand some last words\n")
        sys.stderr.flush()
        os.abort()
    if TROUBLE == "crash in the fourth" and _decoded == 4:
        os._exit(3)
    if TROUBLE == "hang":
        time.sleep(60)
    return 1 if TROUBLE == "refuse" else 0


def _logits(tokens: list[int]) -> Any:
    seed = sum((at + 1) * token for at, token in enumerate(tokens))
    values = [float((seed * (at + 1)) % 97) for at in range(VOCAB_SIZE)]
    if TROUBLE == "nan":
        values[7] = float("nan")
    return (ctypes.c_float * VOCAB_SIZE)(*values)


def llama_synchronize(_context: Any) -> None:
    pass


def llama_get_logits_ith(context: Any, index: int) -> Any:
    assert index == -1
    return context.logits
