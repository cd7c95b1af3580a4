"""Low-rank adapters beside the linear layers of a frozen base (LoRA, rsLoRA, DoRA), by peft."""

from __future__ import annotations


def stored_name(name: str) -> str | None:
    """The base's name of a parameter, or None where it is the adapter's own."""
    if ".lora_" in name:
        return None
    return name.replace(".base_layer.", ".")
