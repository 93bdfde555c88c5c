"""Mean and standard deviation of a reward model on samples of the model it was trained from.

The reward normalized by them has mean 0 and std 1 where PPO starts (arXiv 1909.08593, section 2).
"""

from __future__ import annotations

import random
from typing import cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import RewardConfig
from dpo_cli.durable import replace_json
from dpo_cli.durable.provenance import PROVENANCE, load_provenance
from dpo_cli.model.adapters.active import Adaptation
from dpo_cli.model.classifier import CLASSIFIER
from dpo_cli.model.load import hf_config
from dpo_cli.model.sampling.generate import SamplingOptions
from dpo_cli.rewards.scorers import Completed
from dpo_cli.rewards.scoring import NORMALIZATION, reward_model_scorer
from dpo_cli.session.models import Loaded, Loading, load
from dpo_cli.session.prompts import distinct_prompts
from dpo_cli.session.sampling import complete
from dpo_cli.session.session import Session


def normalize(session: Session, loaded: Loaded) -> dict[str, float]:
    """Measure, and write {mean, std, samples} beside the final weights; returns the run's figures.

    If the run did not start from a policy, nothing is measured, and a note gives the reason.
    """
    stage = cast(RewardConfig, session.config.stage)
    if stage.normalize_prompts == 0:
        return {}
    base = _base(session, loaded.tokenizer)
    if base is None:
        return {}
    rows = _samples(session, loaded, base, stage)
    del base
    scores = np.array(reward_model_scorer(session, loaded.model, loaded.tokenizer)(rows))
    mean, std = float(scores.mean()), float(scores.std())
    if std == 0.0:
        session.note(f"rewards are not normalized: all {len(rows)} samples have the same reward")
        return {}
    if not session.ranks.first:
        return {}
    final = session.run_dir / "final"
    facts = {"mean": mean, "std": std, "samples": len(rows)}
    replace_json(final, PROVENANCE, load_provenance(final) | {NORMALIZATION: facts})
    return {"reward_mean": mean, "reward_std": std}


def _base(session: Session, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel | None:
    """The weights the run started from (not its checkpoint's), if they are a language model's."""
    source = session.config.model
    if source.path is None and source.architecture is not None:
        reason = "random weights"
    elif any(n.endswith(CLASSIFIER) for n in hf_config(source, tokenizer).architectures or ()):
        reason = "a reward model"
    else:
        settings = session.config.lora  # a quantized base needs no more memory than in training
        adaptation = None if settings.name == "none" else Adaptation(settings)
        model = load(session, source, tokenizer, how=Loading(adaptation=adaptation))
        model.to(session.runtime.device)  # type: ignore[arg-type]
        return model
    session.note(
        f"rewards are not normalized: the run started from {reason}, which cannot be sampled from"
    )
    return None


def _samples(
    session: Session, loaded: Loaded, base: PreTrainedModel, stage: RewardConfig
) -> list[Completed]:
    """One completion for each of some distinct training prompts."""
    prompts = distinct_prompts(loaded.splits.train)
    count = min(stage.normalize_prompts, len(prompts))
    chosen = random.Random(session.config.seed).sample(prompts, count)
    options = SamplingOptions(
        max_new_tokens=stage.normalize_max_new_tokens, seed=session.config.seed
    )
    with session.progress.phase("sampling to normalize", count) as tick:
        rows = complete(
            session, base, loaded.tokenizer, [e.prompt_ids for e in chosen], options, tick
        )
    return [
        Completed(e.prompt, row[0]["completion"], row[0]["finished"])
        for e, row in zip(chosen, rows, strict=True)
    ]
