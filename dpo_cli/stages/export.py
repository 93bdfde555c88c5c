"""stage=export: the model as one dense Hugging Face folder, optionally pushed to the hub."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
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
from dpo_cli.data.trained import TRAINED_PROMPTS
from dpo_cli.durable.provenance import PROVENANCE
from dpo_cli.durable.stored import stored_json, yaml_of_run
from dpo_cli.errors import ConfigError, first_line
from dpo_cli.evaluation.policies import run_of, training_cost
from dpo_cli.model.attention.interface import Placement
from dpo_cli.model.classifier import CLASSIFIER
from dpo_cli.model.load import hf_config, load_tokenizer
from dpo_cli.model.read import read_pretrained
from dpo_cli.model.reward import set_padding
from dpo_cli.model.source import Origin, model_folder, origin_of, source_of
from dpo_cli.report.card import write_model_card
from dpo_cli.report.files import first_command, versions
from dpo_cli.session.models import base_provenance
from dpo_cli.session.precision import QUANTIZATION
from dpo_cli.session.preview import Preview, Row, model_rows
from dpo_cli.session.session import Session
from dpo_cli.session.trained import SEEN
from dpo_cli.train.checkpoint import save_final

MODEL_FACTS = ("name", "hub_id", "revision", "path")
# Not uploaded: contain local paths
LOCAL = ["MANIFEST.json", PROVENANCE, TRAINED_PROMPTS]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}  # safetensors' names


def run(session: Session) -> dict[str, Any]:
    """Merge in float32 into the unquantized base, then convert to `stage.dtype`."""
    stage = cast(ExportConfig, session.config.stage)
    source, final = session.config.model, session.run_dir / "final"
    tokenizer = load_tokenizer(source)
    model = load_dense(source, tokenizer, Placement(note=session.note))
    provenance, origin = base_provenance(source), origin_of(source)
    quantization = provenance.get(QUANTIZATION) if origin.adapter else None
    dtype = stage.dtype
    if dtype == "auto":
        dtype = "bf16" if quantization else stored_dtype(source)
    model.to(DTYPES[dtype])  # type: ignore[arg-type]
    for line in description(origin, dtype, quantization):
        session.note(line)
    trained_prompts = model_folder(source.path) / TRAINED_PROMPTS if source.path else None
    files = (
        {TRAINED_PROMPTS: trained_prompts.read_bytes()}
        if trained_prompts and trained_prompts.is_file()
        else {}
    )
    save_final(final, model, tokenizer, provenance, files=files)
    chat = tokenizer.chat_template is not None
    trained_in, step = run_of(model_folder(source.path)) if source.path else (None, None)
    facts = card_facts(session, provenance, chat, trained_in)
    if trained_in and step not in (None, training_cost(trained_in).get("step")):
        facts["results"], trained_in = {}, None  # figures and samples are of the last step
    write_model_card(final, facts, trained_in)
    if stage.push_to_hub is not None:
        push(final, stage.push_to_hub)
        session.note(f"pushed to {stage.push_to_hub}")
    return {"weights": sum(p.numel() for p in model.parameters()), "dtype": dtype}


def plan(preview: Preview) -> Iterator[Row]:
    stage = cast(ExportConfig, preview.config.stage)
    yield "stage", "export"
    yield from model_rows(preview)
    dtype = "dtype of the stored base" if stage.dtype == "auto" else stage.dtype
    yield "export", f"{dtype}, {stage.push_to_hub or 'not on the hub'}"


def description(origin: Origin, dtype: str, quantization: str | None) -> Iterator[str]:
    """What was exported, for the console. quantization: of the base in training."""
    base = origin.base.path or origin.base.hub_id
    if origin.adapter is None:
        yield f"{base} in {dtype}"
        return
    yield f"{origin.adapter} merged into {base} in {dtype}"
    if quantization:
        yield (
            f"it was trained on that base quantized as {quantization} and is merged into the "
            "unquantized one: close to the trained model, but not identical"
        )


def stored_dtype(config: ModelConfig) -> str:
    """The key of `DTYPES` in which most numbers of the base's files are stored."""
    repo, pinned = source_of(config)
    folder = Path(repo)
    if not folder.is_dir():
        folder = Path(snapshot_download(repo, local_files_only=True, **pinned))
    numbers: Counter[str] = Counter()
    for path in folder.glob("model*.safetensors"):  # not optimizer state
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                numbers[part.get_dtype()] += math.prod(part.get_shape())
    kinds = [kind for kind, _ in numbers.most_common() if kind in STORED]
    return STORED[kinds[0]] if kinds else "fp32"


def load_dense(
    source: ModelConfig, tokenizer: PreTrainedTokenizerFast, on: Placement
) -> PreTrainedModel:
    """Policy or classifier with all weights in float32. Raises ConfigError."""
    shape = hf_config(source, tokenizer)
    if not any(name.endswith(CLASSIFIER) for name in shape.architectures or ()):
        return read_pretrained(AutoModelForCausalLM, source, "model.path", on=on)[0]
    auto, labels = AutoModelForSequenceClassification, shape.num_labels
    model, _ = read_pretrained(auto, source, "model.path", on=on, num_labels=labels)
    set_padding(model, source, tokenizer)
    return model


def card_facts(
    session: Session, provenance: dict[str, Any], chat: bool, run: Path | None
) -> dict[str, Any]:
    """The model card's facts on how the weights were trained, read from their run's folder."""
    source = session.config.model
    stored = read_stored(run)
    settings = ("stage", "lora", "optim", "train", "seed")
    config: dict[str, Any] = {k: stored[k] for k in settings if k in stored}
    if isinstance(config.get("stage"), dict):  # else the card would show the reference's full path
        stage = {k: v for k, v in config["stage"].items() if k != "reference"}
        config["stage"] = stage | {"trained_against": provenance.get("reference")}
    data = {k: v for k, v in (stored.get("data") or {}).items() if k in ("name", "hub_id", "path")}
    data = data or ({"name": provenance["data"]} if "data" in provenance else {})
    results = read_object(run / "summary.json", ("stage", "run_dir")) if run else {}
    if SEEN in results:
        data[SEEN] = results[SEEN]
    return {
        "stage": provenance.get("stage", "export"),
        "name": session.run_dir.name,
        "model": base_of(source),
        "data": data,
        "command": first_command(run) if run else [],
        "chat": chat,
        "config": config or ({"trained": provenance} if provenance else {}),
        "results": results,
        "versions": versions(),
    }


def base_of(source: ModelConfig) -> dict[str, Any]:
    """The weights that the chain of runs started from: a hub id, or a folder outside of runs."""
    model, seen = source, set()
    while model.path and model.path not in seen:
        seen.add(model.path)
        stored = read_stored(run_of(model_folder(model.path))[0]).get("model")
        if not isinstance(stored, dict) or not (stored.get("path") or stored.get("hub_id")):
            break
        if stored.get("path") and not Path(stored["path"]).exists():
            return {k: stored.get(k) for k in MODEL_FACTS} | {"name": Path(stored["path"]).name}
        name, hub_id, revision, path = (stored.get(key) for key in MODEL_FACTS)
        model = ModelConfig(str(name), path, hub_id, revision)
    name = Path(model.path).name if model.path else model.name
    return {k: getattr(model, k) for k in MODEL_FACTS} | {"name": name}


def read_stored(run: Path | None) -> dict[str, Any]:
    """A run's resolved configuration; empty for other folders."""
    return yaml_of_run(run / "config.yaml") if run else {}


def read_object(path: Path, without: Sequence[str]) -> dict[str, Any]:
    """The entries of a JSON object, without some keys."""
    return {key: value for key, value in stored_json(path).items() if key not in without}


def push(folder: Path, repository: str) -> None:
    """Upload a folder as a private model. Raises ConfigError in one line."""
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=LOCAL,
            commit_message="Model exported by dpo-run",
        )  # fmt: skip
    except (OSError, ValueError, HTTPError) as error:
        raise ConfigError(
            f"stage.push_to_hub={repository}: {first_line(error)} (log in with `hf auth login`, or "
            f"set HF_TOKEN); the exported model is in {folder}"
        ) from error
