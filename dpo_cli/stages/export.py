"""stage=export: the model as one dense Hugging Face folder, and on the hub where asked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dpo_cli.config import ExportConfig, ModelConfig
from dpo_cli.errors import ConfigError
from dpo_cli.model.classifier import CLASSIFIER
from dpo_cli.model.load import hf_config, load_tokenizer
from dpo_cli.model.read import read_pretrained
from dpo_cli.model.reward import set_padding
from dpo_cli.model.source import Origin, origin_of, source_of
from dpo_cli.report.card import write_model_card
from dpo_cli.report.files import versions
from dpo_cli.stages.precision import QUANTIZATION
from dpo_cli.stages.session import Session, base_provenance
from dpo_cli.train.checkpoint import save_final

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}  # safetensors' names


def run(session: Session) -> dict[str, Any]:
    """Merge in float32 over the unquantised base, then round; the figures count the weights."""
    stage = cast(ExportConfig, session.config.stage)
    source, final = session.config.model, session.run_dir / "final"
    tokenizer = load_tokenizer(source)
    model = load_whole(source, tokenizer)
    provenance, origin = base_provenance(source), origin_of(source)
    over = provenance.get(QUANTIZATION) if origin.adapter else None
    dtype = stage.dtype
    if dtype == "auto":
        dtype = "bf16" if over else stored_dtype(source)
    model.to(DTYPES[dtype])  # type: ignore[arg-type]
    for line in told(origin, dtype, over):
        session.note(line)
    save_final(final, model, tokenizer, provenance)
    write_model_card(final, card_facts(session, provenance))
    if stage.push_to_hub is not None:
        push(final, stage.push_to_hub)
        session.note(f"pushed to {stage.push_to_hub}")
    return {"weights": sum(p.numel() for p in model.parameters()), "dtype": dtype}


def told(origin: Origin, dtype: str, over: str | None) -> Iterator[str]:
    """What the weights are, for the console. over: how the base was quantised in training."""
    base = origin.base.path or origin.base.hub_id
    if origin.adapter is None:
        yield f"{base} in {dtype}"
        return
    yield f"{origin.adapter} merged into {base} in {dtype}"
    if over:
        yield (
            f"it was trained over that base in {over}, and is merged into the unquantised one: "
            "close to what was trained, not the same"
        )


def stored_dtype(config: ModelConfig) -> str:
    """A name of DTYPES: what most numbers of the base's files are stored in."""
    named, pinned = source_of(config)
    folder = Path(named)
    if not folder.is_dir():
        folder = Path(snapshot_download(named, local_files_only=True, **pinned))
    numbers: Counter[str] = Counter()
    for path in folder.glob("model*.safetensors"):  # beside them may lie an optimiser's
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                numbers[part.get_dtype()] += math.prod(part.get_shape())
    kinds = [kind for kind, _ in numbers.most_common() if kind in STORED]
    return STORED[kinds[0]] if kinds else "fp32"


def load_whole(source: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Policy or classifier with all its weights in float32. Raises ConfigError."""
    shape = hf_config(source, tokenizer)
    if not any(name.endswith(CLASSIFIER) for name in shape.architectures or ()):
        return read_pretrained(AutoModelForCausalLM, source, "model.path")[0]
    kind, labels = AutoModelForSequenceClassification, shape.num_labels
    model, _ = read_pretrained(kind, source, "model.path", num_labels=labels)
    set_padding(model, source, tokenizer)
    return model


def card_facts(session: Session, provenance: dict[str, Any]) -> dict[str, Any]:
    """What the card says: how the weights were trained, as far as their folder tells."""
    source = vars(session.config.model)
    return {
        "stage": provenance.get("stage", "export"),
        "name": session.run_dir.name,
        "model": {k: source[k] for k in ("name", "hub_id", "revision", "path")},
        "data": {"name": provenance["data"]} if "data" in provenance else {},
        "config": {"trained": provenance} if provenance else {},
        "versions": versions(),
    }


def push(folder: Path, repository: str) -> None:
    """Upload a folder as a private model. Raises ConfigError in one line."""
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=["MANIFEST.json"],
            commit_message="Model exported by dpo-run",
        )  # fmt: skip
    except (OSError, ValueError, HTTPError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"stage.push_to_hub={repository}: {first} (log in with `hf auth login`, or set "
            f"HF_TOKEN); the model itself is in {folder}"
        ) from error
