"""Check whether policies or the reward model were trained on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_cli.config import DataConfig, RewardModelFn, RunConfig, spec_of
from dpo_cli.config.datasets import described
from dpo_cli.data import trained
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.errors import DataError
from dpo_cli.model.source import model_folder
from dpo_cli.records import EncodedExample

BY_CHANCE = ("sentiment", "imdb")  # data whose prompts are the first few words of a text
MANY = 32  # rows of such data that cannot all be training rows by chance
FEW = 0.01  # fraction of the rows that two different files may share
NAMED = 3  # models listed in a message
SEEN = "eval_rows_trained_on"  # result of `seen_before` in a run's facts


def trained_files(config: RunConfig, splits: EncodedSplits) -> dict[str, bytes]:
    """Files saved with the weights: the keys of the training prompts, and of those that the initial
    weights were trained on."""
    base = trained.read(model_folder(config.model.path)) if config.model.path else None
    return {trained.TRAINED_PROMPTS: trained.as_bytes((e.key for e in splits.train), base)}


def refuse_same(config: DataConfig, splits: EncodedSplits) -> None:
    """DataError if all held-out prompts of a run are training prompts."""
    if config.name in BY_CHANCE and len(splits.eval) < MANY:
        return
    known = {example.key for example in splits.train}
    if splits.eval and all(example.key in known for example in splits.eval):
        raise DataError(
            f"{splits.origin}: all {len(splits.eval):,} held-out prompts are also training "
            "prompts; use other rows (data.eval_path), or hold some out (data.eval_path=null "
            "data.eval_split=null data.eval_rows=0.1)"
        )


def refuse_labels(config: RunConfig, splits: EncodedSplits) -> None:
    """DataError if a stage would take responses that are labeled undesirable for good ones."""
    spec = spec_of(config.stage)
    labels = any(line.endswith(described("kto")) for line in splits.drops.reading)
    if labels and spec.trains and not spec.takes_labels:
        raise DataError(
            f"{splits.origin}: rows with a label each, which stage={config.stage.name} does not "
            "read: use stage=kto, or data.format=completion to take every response for good"
        )


def held_out_line(config: RunConfig, splits: EncodedSplits) -> str | None:
    """A note for a training run without held-out rows, or whose initial weights were trained on
    some of them; None if neither. Raises DataError as `refuse_same` and `refuse_labels` do."""
    refuse_same(config.data, splits)
    refuse_labels(config, splits)
    if not splits.eval:
        return (
            "no rows are held out, so nothing is measured on prompts outside the training data; "
            "set data.eval_rows to a count, or to a fraction such as 0.1"
        )
    seen = seen_before(config, splits)
    if not seen:
        return None
    return (
        f"{seen:,} of {len(splits.eval):,} held-out rows were trained on by "
        f"model.path={config.model.path}: use that run's data settings (data.path, data.eval_rows)"
    )


def seen_before(config: RunConfig, splits: EncodedSplits) -> int:
    """Number of held-out rows that the run's initial weights were trained on; 0 for data whose
    prompts may coincide by chance."""
    base = trained.read(model_folder(config.model.path)) if config.model.path else None
    if base is None or config.data.name in BY_CHANCE:
        return 0
    return int(shared_rows(splits.eval, base).sum())


def known_models(config: RunConfig, policies: Mapping[str, str | None]) -> dict[str, np.ndarray]:
    """Label -> keys of the training prompts, for the policies (label -> folder) and the reward
    model, if saved with them."""
    paths = dict(policies)
    if isinstance(config.reward_fn, RewardModelFn) and config.reward_fn.path:
        paths[f"reward_fn.path={config.reward_fn.path}"] = config.reward_fn.path
    keys_of = {
        label: trained.read(model_folder(path)) for label, path in paths.items() if path is not None
    }
    return {label: keys for label, keys in keys_of.items() if keys is not None}


def check_held_out(
    config: RunConfig, models: Mapping[str, np.ndarray], rows: Sequence[EncodedExample], what: str
) -> str | None:
    """A note on rows that some model was trained on; None if there are none.

    what: name of the rows in messages. Raises DataError unless they are few, the run allows them,
    or its prompts may coincide by chance.
    """
    counts = {label: int(shared_rows(rows, keys).sum()) for label, keys in models.items()}
    trained_on = [(count, label) for label, count in counts.items() if count]
    if not trained_on:
        return None
    (count, label), *others = trained_on[:NAMED]
    line = f"{count:,} of the {len(rows):,} {what} were in the training data of {label}"
    line += "".join(f", {count:,} in that of {label}" for count, label in others)
    line += f", and some in that of {len(trained_on) - NAMED} more models" * (
        len(trained_on) > NAMED
    )
    few = max(counts.values()) <= FEW * len(rows)
    allowed = getattr(config.stage, "allow_trained", False) or config.data.name in BY_CHANCE
    if not (few or allowed):
        raise DataError(
            f"{line}; use the data settings of that run (data.path, data.eval_rows, "
            "data.eval_path), or stage.allow_trained=true to evaluate on them anyway"
        )
    return line


def shared_rows(rows: Sequence[EncodedExample], keys: np.ndarray) -> np.ndarray:
    """(rows,) whether each row's prompt is among the keys."""
    return trained.shared([e.key for e in rows], keys)


def trained_share(rows: Sequence[EncodedExample], keys: np.ndarray | None) -> dict[str, Any]:
    """`trained_share`: the fraction of the rows that the model was trained on; empty if 0."""
    share = 0.0 if keys is None else float(shared_rows(rows, keys).mean())
    return {"trained_share": share} if share else {}
