"""What an adapter's folder changes in its base itself: rows of the embedding that it brings, and
starts that take the adapter's first value out of the base (PiSSA, OLoRA, LoftQ)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from dpo_cli.model.adapters.active import brought
from dpo_cli.model.source import Origin

# PEFT works these out from the base again whenever it puts such an adapter in.
TAKEN_OUT = ("pissa", "olora", "loftq")


def start_of(facts: dict[str, Any]) -> str:
    """How the adapter's weights were initialized, "" for the usual ways."""
    start = facts.get("init_lora_weights")
    return start.lower() if isinstance(start, str) else ""


def takes_out(facts: dict[str, Any]) -> bool:
    """Whether putting the adapter in changes the base."""
    return start_of(facts).startswith(TAKEN_OUT)


def changes_base(origin: Origin) -> bool:
    """Whether the base under the adapter is another than that of its own folder."""
    if origin.adapter is None:
        return False
    return takes_out(origin.facts) or bool(replaced(origin.adapter, origin.facts))


def replaced(folder: Path, facts: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names in the file and shapes of the base's weights that the folder has others of: not those
    of modules to save, which lie beside the base's own."""
    beside = facts.get("modules_to_save") or ()
    return {
        name: shape
        for name, shape in brought(folder).items()
        if not any(f".{module}." in f".{name}" for module in beside)
    }


def fit_embedding(model: PreTrainedModel, origin: Origin) -> None:
    """As many rows of embedding and output layer as the adapter's file has: tokens were added
    before it was trained, or rows without a token taken off. The values are read with it."""
    rows = embedding_rows(model, origin)
    if rows is not None and rows != len(cast(Any, model.get_input_embeddings()).weight):
        model.resize_token_embeddings(rows, mean_resizing=False)


def embedding_rows(model: PreTrainedModel, origin: Origin) -> int | None:
    """Rows of the embedding, or of the output layer, that the adapter's file holds; None without
    them."""
    if origin.adapter is None:
        return None
    found = brought(origin.adapter)
    ends = [x for x in (model.get_input_embeddings(), model.get_output_embeddings()) if x]
    for name, part in model.named_modules():
        if any(part is end for end in ends):
            for inner in ("", "base_layer.", "token_adapter.base_layer."):
                if shape := found.get(f"{name}.{inner}weight"):
                    return shape[0]
    return None
