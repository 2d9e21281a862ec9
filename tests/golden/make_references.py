"""Write greedy reference answers of a model folder; needs torch, transformers and accelerate.

    cd tests && python -m golden.make_references MODEL_FOLDER [PROMPTS.json]

Reads names, `prompt_ids` and `max_new_tokens` from PROMPTS.json (default: the file that is
written) and writes `references.json` beside this script: the tokens that transformers answers with
in float32, and `certain`, how many of them come before the first whose lead over the runner-up is
below MARGIN. Weights are used exactly as stored, FP8 and FP4 decoded.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # type: ignore[import-not-found,unused-ignore]
from transformers import DeepseekV4ForCausalLM, DynamicCache

OUTPUT = Path(__file__).parent / "references.json"
MARGIN = 0.05


@torch.no_grad()
def greedy(model: DeepseekV4ForCausalLM, ids: list[int], count: int) -> Iterator[tuple[int, float]]:
    """Yield (token, lead over the runner-up) until the end mark or `count` tokens."""
    cache = DynamicCache(config=model.config)
    inputs = torch.tensor([ids])
    for _ in range(count):
        logits = model(inputs, past_key_values=cache, use_cache=True).logits[0, -1].float()
        best = logits.topk(2)
        token = int(best.indices[0])
        yield token, float(best.values[0] - best.values[1])
        if token == model.config.eos_token_id:
            return
        inputs = torch.tensor([[token]])


def reference(model: DeepseekV4ForCausalLM, prompt: dict[str, Any]) -> dict[str, Any]:
    """Answer one prompt."""
    answer = list(greedy(model, prompt["prompt_ids"], prompt["max_new_tokens"]))
    narrow = [at for at, (_, lead) in enumerate(answer) if lead < MARGIN]
    return {
        "name": prompt["name"],
        "prompt": prompt["prompt"],
        "prompt_ids": prompt["prompt_ids"],
        "max_new_tokens": prompt["max_new_tokens"],
        "output_ids": [token for token, _ in answer],
        "certain": narrow[0] if narrow else len(answer),
    }


def main() -> None:
    """Write the references of the model named on the command line."""
    torch.set_num_threads(1)
    model = DeepseekV4ForCausalLM.from_pretrained(
        sys.argv[1], attn_implementation="eager", experts_implementation="eager"
    )
    model = model.float().eval()
    source = Path(sys.argv[2]) if len(sys.argv) > 2 else OUTPUT
    prompts = json.loads(source.read_text(encoding="utf-8"))
    lines = [json.dumps(reference(model, prompt), ensure_ascii=False) for prompt in prompts]
    OUTPUT.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
