"""Reference log-probabilities: computed once, sorted by length, cached by content.

The key is a digest of the reference's weights, the token ids of every row and the
precision, so a changed row, tokenizer or truncation misses, and the runs of a beta sweep
share one pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config import RunConfig
from dpo_cli.data.dataset import fingerprint
from dpo_cli.durable import damage, publish_folder
from dpo_cli.errors import ConfigError, DiskError
from dpo_cli.model.forward import computed_by, sequence_logprobs
from dpo_cli.model.load import model_digest
from dpo_cli.records import EncodedExample
from dpo_cli.stages.session import Loaded, Session, load, load_named, over_rows


def reference_path(config: RunConfig, loaded: Loaded) -> str | None:
    """`stage.reference`; the policy itself by default, unless it was tuned against one already."""
    named: str | None = cast(Any, config.stage).reference
    kind = {"dpo": "a DPO", "ppo-baseline": "a PPO"}.get(str(loaded.base.get("stage")))
    if named is None and kind:
        raise ConfigError(
            f"model.path={config.model.path} is itself {kind} policy, trained against "
            f"{loaded.base.get('reference')}: name the reference with stage.reference=<folder> "
            "(that one to keep it, model.path to start afresh from this policy)"
        )
    return named


def load_reference(session: Session, loaded: Loaded, named: str | None) -> PreTrainedModel:
    """The named reference, or the weights the run started from (not the checkpoint's)."""
    if named is not None:
        return load_named(session, named, loaded.tokenizer, as_trained=True)
    return load(session, session.config.model, loaded.tokenizer, as_trained=True)


def reference_key(
    session: Session, model: PreTrainedModel, examples: Sequence[EncodedExample]
) -> str:
    """Digest of all that the log-probabilities depend on."""
    runtime = session.runtime
    computed = f"{runtime.device.type} {runtime.precision} {computed_by(model)}"
    text = f"{model_digest(model)} {fingerprint(examples)} {computed} v2"
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def compute(
    session: Session, model: PreTrainedModel, examples: Sequence[EncodedExample], name: str
) -> Tensor:
    """(rows, K) float32 log-probability of every response, in the order of the rows."""
    branches = len(examples[0].response_ids)
    values = torch.zeros(len(examples), branches)
    model.to(session.runtime.device).eval()  # type: ignore[arg-type]
    with session.progress.phase(name, len(examples)) as tick:
        made = over_rows(
            session, examples, lambda row: sequence_logprobs(model, row).cpu(), tick=tick
        )
        for row, found in made:
            values[row.example_ids] = found.view(-1, branches)
    return values


def cached(
    session: Session, model: PreTrainedModel, examples: Sequence[EncodedExample], name: str
) -> tuple[Tensor, str]:
    """As `compute`, read from or written to the cache folder; and the cache's key."""
    key = reference_key(session, model, examples)
    folder = Path(session.config.cache_dir) / "reference" / key[:32]
    found = session.ranks.from_first(lambda: read(folder))
    if found is not None:
        session.note(f"{name}: read from cache {key[:12]}")
        return found, key
    values = session.within_memory(lambda: compute(session, model, examples, name))

    def write(target: Path) -> None:
        save_file({"logprobs": values}, target / "logprobs.safetensors")
        about = {"rows": len(examples), "precision": session.runtime.precision, "key": key}
        (target / "about.json").write_text(json.dumps(about))

    if not session.ranks.first:
        return values, key
    try:
        publish_folder(folder, write)
    except DiskError as error:  # another run of a sweep published it first, or no room
        session.note(f"{name}: not cached: {error}")
    return values, key


def read(folder: Path) -> Tensor | None:
    """A cache entry, or None if it is absent or damaged."""
    if not folder.is_dir() or damage(folder) is not None:
        return None
    tensors: dict[str, Any] = load_file(folder / "logprobs.safetensors")
    return cast(Tensor, tensors["logprobs"])
