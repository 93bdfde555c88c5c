"""How an adapter's folder changes the base: a resized embedding, and initializations that subtract
the adapter's initial value from the base (PiSSA, OLoRA, LoftQ)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from dpo_cli.model.adapters.active import full_weight_shapes
from dpo_cli.model.source import Origin

# PEFT recomputes these from the base whenever such an adapter is added.
SUBTRACTING = ("pissa", "olora", "loftq")


def initialization_of(facts: dict[str, Any]) -> str:
    """How the adapter's weights were initialized; "" for the default."""
    start = facts.get("init_lora_weights")
    return start.lower() if isinstance(start, str) else ""


def subtracts_from_base(facts: dict[str, Any]) -> bool:
    """Whether adding the adapter changes the base."""
    return initialization_of(facts).startswith(SUBTRACTING)


def changes_base(origin: Origin) -> bool:
    """Whether the base under the adapter differs from the base's own folder."""
    if origin.adapter is None:
        return False
    return subtracts_from_base(origin.facts) or bool(replaced_shapes(origin.adapter, origin.facts))


def replaced_shapes(folder: Path, facts: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of base weights that the adapter's file replaces (not modules_to_save, which
    are kept beside the base's)."""
    beside = facts.get("modules_to_save") or ()
    return {
        name: shape
        for name, shape in full_weight_shapes(folder).items()
        if not any(f".{module}." in f".{name}" for module in beside)
    }


def fit_embedding(model: PreTrainedModel, origin: Origin) -> None:
    """Resize embedding and output layer to the adapter's file, if tokens were added or removed
    before it was trained. The values are loaded with the adapter."""
    rows = embedding_rows(model, origin)
    if rows is not None and rows != len(cast(Any, model.get_input_embeddings()).weight):
        model.resize_token_embeddings(rows, mean_resizing=False)


def embedding_rows(model: PreTrainedModel, origin: Origin) -> int | None:
    """Number of embedding or output rows in the adapter's file; None if it has neither."""
    if origin.adapter is None:
        return None
    shapes = full_weight_shapes(origin.adapter)
    ends = [x for x in (model.get_input_embeddings(), model.get_output_embeddings()) if x]
    for name, part in model.named_modules():
        if any(part is end for end in ends):
            for inner in ("", "base_layer.", "token_adapter.base_layer."):
                if shape := shapes.get(f"{name}.{inner}weight"):
                    return shape[0]
    return None
