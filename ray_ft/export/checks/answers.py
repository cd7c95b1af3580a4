"""What the exported folder answers, by each of its readers, against what the trained weights answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from ray_ft.errors import ExportError
from ray_ft.export import lora
from ray_ft.export.case import Case
from ray_ft.export.gate import LeftOut, check
from ray_ft.export.reference import Distance
from ray_ft.export.tensorfile import Reader
from ray_ft.model import adapter, gemma3n, load

REPORT = "report this with the recipe: what was written is not what was trained"
TRAIN_MORE = ["train longer, or with a higher train.optimizer.lr", "check model.adapter.target_modules"]


@check("adapter_effect")
def adapter_effect(case: Case) -> dict[str, Any]:
    """The adapter is not zero, and changes the trained model's answers."""
    layers, learnt = 0, 0
    for b in _ups(case):
        layers += 1
        learnt += bool(b.any())
    if not learnt:
        raise ExportError(
            f"the adapter changes nothing after {case.trained.found.step} steps: B is zero in all its {layers} "
            "layers, so that this would publish the base model",
            TRAIN_MORE,
        )
    effect = case.reference.effect
    assert effect is not None
    if not effect.rms > 0:
        raise ExportError(
            f"the adapter's {learnt} layers that are not zero leave every answer as it is: this would publish the base "
            "model",
            TRAIN_MORE,
        )
    return {"layers": layers, "layers_learnt": learnt, "change_rms": effect.rms, "change_largest": effect.largest}


def _ups(case: Case) -> Iterator[torch.Tensor]:
    """The matrices B of all layers, one by one: as exported, or where they are merged as trained."""
    if case.kind == "adapter":
        with Reader(os.path.join(case.folder, lora.WEIGHTS)) as reader:
            for name in reader.entries:
                if name.endswith(lora.PARTS[adapter.UP]):
                    yield reader.read(name)
        return
    for _, tensor in lora.matrices(case.trained, lora.entries(case.trained), adapter.UP):
        yield tensor


@check("logits_transformers")
def logits_transformers(case: Case) -> dict[str, Any]:
    """transformers, given the folder alone, computes the trained model's logits; an adapter is put on by peft."""
    reference = case.reference
    vllm = case.vllm
    if not isinstance(vllm, str) and not vllm.asked and _room_for_two(case):
        vllm.ask(case.folder, [list(ids) for ids in reference.documents])  # loads while transformers does
    model = _loaded(case)
    found = _compared(case, reference.distance_of(model))
    return {**found, "rows_with_images": len(reference.pictured)} if reference.pictured else found


def _loaded(case: Case) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    auto = AutoModelForSequenceClassification if case.trained.labels else AutoModelForCausalLM

    logging.disable_progress_bar()
    folder = case.folder if case.kind == "model" else case.trained.base
    config = load.load_config(folder, case.trained.labels)
    try:
        model, info = auto.from_pretrained(
            folder,
            dtype=case.dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            trust_remote_code=False,  # said, as transformers would else ask on the terminal
            **({"config": load.buildable(config)} if gemma3n.misses_tower(config) else {}),
        )
        if case.kind == "adapter":
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, case.folder, autocast_adapter_dtype=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(
            f"transformers does not load the exported folder: {str(error).splitlines()[0]}", [REPORT]
        ) from error
    finally:
        logging.enable_progress_bar()
    expected = gemma3n.passed_over(model, info["unexpected_keys"])
    faults = {name: sorted(map(str, set(keys) - expected)) for name, keys in info.items() if set(keys) - expected}
    if faults:
        raise ExportError(f"transformers does not load the exported folder cleanly: {faults}", [REPORT])
    if case.kind == "model" and load.stored_names(model) != load.stored_names(case.model):
        raise ExportError(f"transformers makes a {type(model).__name__} of it, which is another model", [REPORT])
    return model.eval()


def _room_for_two(case: Case) -> bool:
    """Whether vLLM's copy and transformers' fit into memory beside each other."""
    import psutil

    from ray_ft.export.vllm_process import OVERHEAD

    weights = case.parameters * case.dtype.itemsize
    on_cpu = 1 if torch.cuda.is_available() else 2
    return psutil.virtual_memory().available > on_cpu * weights + OVERHEAD


@check("logits_vllm")
def logits_vllm(case: Case) -> dict[str, Any]:
    """vLLM, given the folder alone, gives the rows' tokens the trained model's log-probabilities; of an adapter beside
    its base, other ones than the base's."""
    if isinstance(case.vllm, str):
        raise LeftOut(case.vllm)
    reference = case.reference
    if not case.vllm.asked:
        case.vllm.ask(case.folder, [list(ids) for ids in reference.documents])
    found = case.vllm.answer()
    if ignored := found["ignored"]:
        raise ExportError(
            f"vLLM has no layer for {len(ignored)} of the adapter's tensors and would pass over them in silence: "
            f"{', '.join(ignored[:3])}",
            ["export the whole model, with the adapter merged: leave --adapter-only out"],
        )
    said = _by_token(found["answers"])
    if found["without"] is not None and _by_token(found["without"]) == said:
        raise ExportError("vLLM answers with the adapter exactly as without it: it serves the base model", [REPORT])
    return _compared(case, reference.logprob_distance(said))


def _by_token(answers: list[list[list[list[float]]]]) -> list[list[dict[int, float]]]:
    return [[{int(token): value for token, value in position} for position in document] for document in answers]


def _compared(case: Case, distance: Distance) -> dict[str, Any]:
    tolerance, effect = case.tolerance, case.reference.effect
    if not tolerance.holds(distance):  # also refuses NaN
        raise ExportError(
            f"what is exported differs from the trained model by {distance.rms:.3g} of the logits' spread (largest "
            f"{distance.largest:.3g}), over {tolerance.rms:.3g} (largest {tolerance.largest:.3g})",
            [REPORT],
        )
    # By the triangle inequality: what is within half the adapter's effect is nearer to the trained model than the base.
    if effect is not None and distance.rms >= effect.rms / 2:
        raise ExportError(
            f"what is exported differs from the trained model by {distance.rms:.3g} of the logits' spread, and the "
            f"adapter changes them by no more than {effect.rms:.3g}: this may as well be the base model",
            TRAIN_MORE,
        )
    return {
        "rows": len(case.reference.documents),
        "tokens": sum(map(len, case.reference.documents)),
        "difference_rms": distance.rms,
        "difference_largest": distance.largest,
        "tolerance_rms": tolerance.rms,
        "tolerance_largest": tolerance.largest,
    }
