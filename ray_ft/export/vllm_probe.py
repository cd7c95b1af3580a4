"""What vLLM answers, in a process of its own: ``python -m ray_ft.export.vllm_probe`` reads one request from its input.

vLLM is imported before the request is read, so that whoever starts the process early waits less; without a request it
ends. Everything that vLLM prints stays in the process's output; the result goes into a file that the request names.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    from vllm import LLM

    text = sys.stdin.read()
    if not text:
        return
    request = json.loads(text)
    engine = LLM(**request["engine"])
    result: dict[str, Any] = {"ignored": [], "without": None}
    adapter = None
    if request["adapter"]:
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest("adapter", 1, request["adapter"])
        # A name that fits no layer is passed over in silence, and the base answers in its place (vllm#34186).
        result["ignored"] = sorted({key for keys in engine.apply_model(_Ignored(request["keys"])) for key in keys})
        result["without"] = _answers(engine, request, None)
    result["answers"] = _answers(engine, request, adapter)
    with open(request["result"], "w", encoding="utf-8") as stream:
        json.dump(result, stream)


def _answers(engine: Any, request: dict[str, Any], adapter: Any) -> list[list[list[list[float]]]]:
    """For each document, for each position but the first: [token, log-probability] of the likeliest and its own."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=request["likeliest"])
    prompts = [{"prompt_token_ids": ids} for ids in request["documents"]]
    outputs = engine.generate(prompts, asked, lora_request=adapter, use_tqdm=False)
    return [
        [[[token, said.logprob] for token, said in position.items()] for position in output.prompt_logprobs[1:]]
        for output in outputs
    ]


class _Ignored:
    """Which keys of an adapter's file name no layer that vLLM would put it on; called in the engine, on its model."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys

    def __call__(self, model: Any) -> list[str]:
        from vllm.lora.layers import BaseLayerWithLoRA
        from vllm.lora.utils import parse_fine_tuned_lora_name

        packed = getattr(model, "packed_modules_mapping", {})
        known = set()
        for name, module in model.named_modules():
            if isinstance(module, BaseLayerWithLoRA):
                parent, _, last = name.rpartition(".")
                if last == "logits_processor":  # in whose place the output projection's adapter is applied
                    last = "lm_head"
                known |= {f"{parent}.{part}" if parent else part for part in packed.get(last, [last])}
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        mapper = mapper.get_rename_mapper() if mapper is not None else None
        return [key for key in self.keys if parse_fine_tuned_lora_name(key, mapper)[0] not in known]


if __name__ == "__main__":
    main()
