"""Write the reference files of this folder; needs torch and transformers.

    cd tests && python -m golden.make_oracle [NAME ...] [--scan SEEDS]

For each preset: `NAME/oracle.npz` (prompt, float32 logits of transformers, chosen index entries,
some activations), `NAME/config.json` as transformers writes it, and `NAME/report.json` (agreement
of transformers with itself, margins, versions). `--scan` only prints the margins of some seeds.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.names import module_weights
from golden.presets import CSA, HCA, PRESETS, Preset
from golden.storage import official_storage
from golden.weights import input_ids, random_weights

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # type: ignore[import-not-found,unused-ignore]
import transformers  # type: ignore[import-not-found,unused-ignore]
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

FOLDER = Path(__file__).parent
# Cycled until the prompt is used up: crosses windows and blocks at odd places.
CHUNKS = (1, 3, 4, 5, 120, 127, 128, 129, 1, 1, 40)
# Activations are kept at every so many positions, to keep the files small.
TRACE_STRIDE = 16


@dataclasses.dataclass(slots=True)
class Margins:
    """Smallest distance at a top-k boundary: below it another engine may choose otherwise."""

    router: float = float("inf")
    index: float = float("inf")


def build_model(preset: Preset) -> DeepseekV4ForCausalLM:
    """Return the float32 model of a preset with its exact weights."""
    settings = preset.settings
    if preset.rates != (4, 128):
        del settings["compress_ratios"]
        settings["layer_types"] = preset.layer_types
        settings["compress_rates"] = {CSA: preset.rates[0], HCA: preset.rates[1]}
    config = DeepseekV4Config(**settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = DeepseekV4ForCausalLM(config).float().eval()
    weights = random_weights(preset)
    if preset.official_storage:
        weights = official_storage(weights)[1]
    state = {
        name: torch.from_numpy(np.ascontiguousarray(values))
        for name, values in module_weights(weights).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any("rotary" not in name for name in missing):
        raise RuntimeError(f"{preset.name}: missing {missing}, unexpected {unexpected}")
    return model


@contextmanager
def watched(model: DeepseekV4ForCausalLM) -> Iterator[tuple[dict[str, NDArray[Any]], Margins]]:
    """Collect activations and margins of the forward passes inside the block."""
    traces: dict[str, NDArray[Any]] = {}
    margins = Margins()
    hooks = []

    def keep(module: torch.nn.Module, key: str, pick: Callable[[Any], torch.Tensor]) -> None:
        # A hook must return None: any other value would replace the module's output.
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            traces[key] = pick(output).detach().numpy().copy()

        hooks.append(module.register_forward_hook(hook))

    for number, layer in enumerate(model.model.layers):
        keep(layer, f"layer{number}_out", lambda output: output[0])
        keep(layer.self_attn, f"layer{number}_attn", lambda output: output[0][0])
        keep(layer.mlp, f"layer{number}_mlp", lambda output: output[0])
        if not layer.mlp.is_hash:
            hooks.append(layer.mlp.gate.register_forward_hook(_router_hook(margins)))
        indexer = getattr(getattr(layer.self_attn, "compressor", None), "indexer", None)
        if indexer is not None:
            keep(indexer, f"layer{number}_topk", lambda output: output[0])
            hooks.append(indexer.scorer.register_forward_hook(_index_hook(margins, indexer)))
    keep(model.model.hc_head, "hc_head", lambda output: output[0])
    yield traces, margins
    for handle in hooks:
        handle.remove()


def _router_hook(margins: Margins) -> Callable[..., None]:
    def hook(gate: Any, _inputs: Any, output: Any) -> None:
        scores = gate.score_fn(output[0]) + gate.e_score_correction_bias
        ranked = scores.sort(-1, descending=True).values
        gap = (ranked[:, gate.top_k - 1] - ranked[:, gate.top_k]).min().item()
        margins.router = min(margins.router, gap)

    return hook


def _index_hook(margins: Margins, indexer: Any) -> Callable[..., None]:
    def hook(_scorer: Any, _inputs: Any, scores: Any) -> None:
        for position in range(scores.shape[1]):
            visible = (position + 1) // indexer.compress_rate
            if visible > indexer.index_topk:
                ranked = scores[0, position, :visible].sort(descending=True).values
                gap = (ranked[indexer.index_topk - 1] - ranked[indexer.index_topk]).item()
                margins.index = min(margins.index, gap)

    return hook


def prefill(preset: Preset) -> tuple[dict[str, NDArray[Any]], Margins]:
    """Return the content of `oracle.npz`, and the margins."""
    model, ids = build_model(preset), input_ids(preset)
    with torch.no_grad(), watched(model) as (traces, margins):
        logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].float().numpy()
    content: dict[str, NDArray[Any]] = {"input_ids": ids, "logits_prefill": logits}
    for key, values in traces.items():
        if key.endswith("_topk"):
            content[key] = np.sort(values, axis=-1).astype(np.int16)
        else:
            content[key] = values[::TRACE_STRIDE]
    return content, margins


def in_chunks(preset: Preset, sizes: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the logits of the prompt fed through a cache in chunks of these sizes, cycled."""
    model, ids = build_model(preset), torch.from_numpy(input_ids(preset))[None]
    cache = DynamicCache(config=model.config)
    logits, start, number = [], 0, 0
    while start < preset.length:
        stop = start + sizes[number % len(sizes)]
        with torch.no_grad():
            output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        logits.append(output.logits[0].float().numpy())
        start, number = stop, number + 1
    return np.concatenate(logits)


def write(preset: Preset) -> None:
    """Write the files of one preset."""
    content, margins = prefill(preset)
    logits = content["logits_prefill"]
    decoded, chunked = in_chunks(preset, (1,)), in_chunks(preset, CHUNKS)
    report = {
        "length": preset.length,
        "seed": preset.seed,
        "official_storage": preset.official_storage,
        "smallest_router_margin": margins.router,
        "smallest_index_margin": margins.index if np.isfinite(margins.index) else None,
        "largest_logit": float(np.abs(logits).max()),
        "prefill_vs_decode": float(np.abs(logits - decoded).max()),
        "prefill_vs_chunks": float(np.abs(logits - chunked).max()),
        "argmax_agreement": float((logits.argmax(-1) == decoded.argmax(-1)).mean()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    folder = FOLDER / preset.name
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "oracle.npz", allow_pickle=False, **content)
    write_config(preset, folder)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)
    print(preset.name, json.dumps(report, indent=1))


def write_config(preset: Preset, folder: Path) -> None:
    """Write `config.json` as `save_pretrained` of the whole model does."""
    config = build_model(preset).config
    config.architectures = [DeepseekV4ForCausalLM.__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)


def scan(preset: Preset, seeds: int) -> None:
    """Print the margins of the first seeds, to choose one whose choices are clear."""
    for seed in range(seeds):
        _, margins = prefill(dataclasses.replace(preset, seed=seed))
        print(f"{preset.name} seed {seed}: router {margins.router:.1e} index {margins.index:.1e}")


def main() -> None:
    """Parse the command line and write or scan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(PRESETS), metavar="NAME")
    parser.add_argument("--scan", type=int, metavar="SEEDS")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        if arguments.scan:
            scan(PRESETS[name], arguments.scan)
        else:
            write(PRESETS[name])


if __name__ == "__main__":
    main()
