"""The frozen reference, and its log-probabilities: computed once and cached by content.

The key is a digest of the reference's weights, the token ids of every row and the precision: a
changed row, tokenizer or truncation is a cache miss, and the runs of a beta sweep share one pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config import RunConfig
from dpo_cli.data.dataset import fingerprint
from dpo_cli.durable import cache
from dpo_cli.durable.temporary import remove_leftovers
from dpo_cli.errors import ConfigError, DiskError
from dpo_cli.model.adapters.active import REFERENCE, adapter_as, is_adapted
from dpo_cli.model.adapters.base import changes_base
from dpo_cli.model.base import content_in, refuse_other_base
from dpo_cli.model.digest import loaded_digest
from dpo_cli.model.forward import computed_by, head_of, sequence_logprobs
from dpo_cli.model.source import Origin, origin_of
from dpo_cli.records import Batch, EncodedExample
from dpo_cli.session.models import AS_TRAINED, Loaded, Loading, load, load_named, named_source
from dpo_cli.session.rows import over_rows
from dpo_cli.session.session import Session

LOGPROBS = "logprobs.safetensors"  # the file of a cache entry


@dataclass(frozen=True)
class Sums:
    """A sum over a response's tokens other than the plain one; name: for cache keys."""

    compute: Callable[[PreTrainedModel, Batch], Tensor]
    name: str


@dataclass(frozen=True)
class Reference:
    """The frozen policy of the log-ratios: a separate model, or (`shared`) the trained model with
    another adapter or none, so that the base weights are in memory once."""

    model: PreTrainedModel
    shared: bool = False
    adapter: str | None = None

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The model as the reference during the body, without gradients or dropout."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                if not self.shared:
                    yield self.model
                else:
                    with adapter_as(self.model, self.adapter):
                        yield self.model
        finally:
            self.model.train(was_training)

    def frozen(self, device: torch.device) -> Reference:
        """Move a separate model to a device and freeze it."""
        if not self.shared:
            self.model.to(device).requires_grad_(False)  # type: ignore[arg-type]
        return self

    @cached_property
    def digest(self) -> str:
        """Digest of the function it computes; a shared base must not be trained."""
        with self.active() as model:
            return loaded_digest(model)


def reference_path(config: RunConfig, loaded: Loaded) -> str | None:
    """`stage.reference`; None for the policy itself. ConfigError if it is null and the policy was
    itself trained against a reference."""
    path: str | None = cast(Any, config.stage).reference
    kinds = {"dpo": "a DPO", "online-dpo": "an online DPO", "ppo-baseline": "a PPO"}
    kind = kinds.get(str(loaded.base.get("stage")))
    if path is None and kind:
        raise ConfigError(
            f"model.path={config.model.path} is itself {kind} policy, trained against "
            f"{loaded.base.get('reference')}: set stage.reference=<folder> (that one to keep it, "
            "model.path to use this policy as the new reference)"
        )
    return path


def load_reference(session: Session, loaded: Loaded, path: str | None) -> Reference:
    """The reference at `path`, or the weights the run started from (not the checkpoint's).

    If only adapters differ, the reference shares the trained model's base.
    """
    config, policy = session.config, loaded.model
    origin = reference_origin(config, policy)
    if origin is not None:
        adapter = None if origin.adapter is None else REFERENCE  # see `load_start_adapter`
        return Reference(policy, shared=True, adapter=adapter)
    if path is not None:
        return Reference(load_named(session, path, loaded.tokenizer, how=AS_TRAINED))
    return Reference(load(session, config.model, loaded.tokenizer, how=AS_TRAINED))


def reference_origin(config: RunConfig, policy: PreTrainedModel) -> Origin | None:
    """The reference's origin if it differs from the policy only by its adapter; None if its base
    differs."""
    if not is_adapted(policy):
        return None
    path = cast(Any, config.stage).reference
    source = config.model if path is None else named_source(config.model, path)
    origin, start = origin_of(source, "stage.reference"), origin_of(config.model)
    if origin.identity() != start.identity():
        return None
    if _adapter_folder(origin) != _adapter_folder(start) and (
        changes_base(origin) or changes_base(start)
    ):
        return None  # one of the adapters changes the base
    return origin


def _adapter_folder(origin: Origin) -> Path | None:
    return None if origin.adapter is None else origin.adapter.resolve()


def load_start_adapter(
    config: RunConfig, note: Callable[[str], None], policy: PreTrainedModel
) -> None:
    """Load the adapter of a reference on the same base beside the policy's, before sharding."""
    origin = reference_origin(config, policy)
    if origin is not None and origin.adapter is not None:
        from dpo_cli.model.adapters import lora  # PEFT is slow to import

        key = "stage.reference"
        refuse_other_base(content_in(policy), origin, config.model, key, note)
        lora.add_reference(policy, origin)


def policy_loading(session: Session) -> Loading:
    """How to load a policy whose reference may be its initial adapter (`load_start_adapter`)."""
    return Loading(before_sharding=partial(load_start_adapter, session.config, session.note))


def reference_key(
    session: Session,
    reference: Reference,
    examples: Sequence[EncodedExample],
    sums: Sums | None = None,
) -> str:
    """Digest of everything that the log-probabilities depend on."""
    runtime = session.runtime
    model = reference.model
    head = head_of(model).rounding(runtime.device, session.placement.dtype)
    computed = f"{runtime.device.type} {runtime.precision} {computed_by(model)}{head}"
    text = f"{reference.digest} {fingerprint(examples)} {computed} v3{sums.name if sums else ''}"
    return hashlib.sha256(text.encode()).hexdigest()


def cache_key(session: Session, key: str) -> str:
    """The key in the cache, which depends on sharding, as gathered half-precision weights round
    more than autocast does; `key` identifies the run in either case."""
    if session.ranks.size == 1 or session.runtime.precision == "fp32":
        return key
    return hashlib.sha256(f"{key} sharded".encode()).hexdigest()


@torch.no_grad()
def compute(
    session: Session,
    model: PreTrainedModel,
    examples: Sequence[EncodedExample],
    name: str,
    sums: Sums | None = None,
) -> Tensor:
    """(rows, K) float32 log-probability of every response, in the order of the rows."""
    compute_row = sums.compute if sums else sequence_logprobs
    branches = len(examples[0].response_ids)
    values = torch.zeros(len(examples), branches)
    model.to(session.runtime.device)  # type: ignore[arg-type]
    with session.progress.phase(name, len(examples)) as tick:
        results = over_rows(session, examples, lambda row: compute_row(model, row).cpu(), tick=tick)
        for row, logprobs in results:
            values[row.example_ids] = logprobs.view(-1, branches)
    return values


def cached(
    session: Session,
    reference: Reference,
    examples: Sequence[EncodedExample],
    name: str,
    sums: Sums | None = None,
) -> tuple[Tensor, str]:
    """`compute` through the cache; returns the values and the key."""
    with reference.active() as model:
        key = reference_key(session, reference, examples, sums)
        folder = Path(session.config.cache_dir) / "reference" / cache_key(session, key)[:32]
        shape = (len(examples), len(examples[0].response_ids))
        logprobs = session.ranks.from_first(lambda: read(folder, shape))
        if logprobs is not None:
            session.note(f"{name}: read from cache {key[:12]}")
            return logprobs, key
        values = session.within_memory(lambda: compute(session, model, examples, name, sums))

    def write(target: Path) -> None:
        save_file({"logprobs": values}, target / LOGPROBS)
        about = {"rows": len(examples), "precision": session.runtime.precision, "key": key}
        (target / "about.json").write_text(json.dumps(about), encoding="utf-8")

    if not session.ranks.first:
        return values, key
    try:
        cache.subfolder(folder.parent.parent, folder.parent.name)
        cache.keep_folder(folder, write)
    except DiskError as error:  # another run of a sweep published it first, or the disk is full
        session.note(f"{name}: not cached: {error}")
    return values, key


def read(folder: Path, shape: tuple[int, int]) -> Tensor | None:
    """A cache entry of this shape, (rows, K); None if it is missing or damaged."""
    remove_leftovers(folder.parent)
    files = cache.read_folder(folder)
    try:
        logprobs: Tensor | None = load_tensors(files[LOGPROBS])["logprobs"] if files else None
    except (KeyError, SafetensorError):
        return None
    return logprobs if logprobs is not None and logprobs.shape == shape else None
