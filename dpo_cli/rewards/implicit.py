"""The implicit reward of a policy trained with DPO (arXiv 2305.18290 eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dpo_cli.config import LabelConfig
from dpo_cli.errors import ConfigError
from dpo_cli.model.forward import sequence_logprobs
from dpo_cli.model.load import load_tokenizer
from dpo_cli.records import Batch
from dpo_cli.rewards.completions import Encoding, values_of
from dpo_cli.rewards.scorers import Completed, Scorer, finite
from dpo_cli.session.models import base_provenance, load, load_named
from dpo_cli.session.session import Session


@dataclass(frozen=True)
class ImplicitReward:
    """beta (log pi - log pi_ref) of a completion given its prompt, in nats times beta.

    Omits the prompt's log Z, which cancels between two completions.
    """

    session: Session
    policy: PreTrainedModel
    reference: PreTrainedModel
    encoding: Encoding
    beta: float

    def __call__(self, rows: Sequence[Completed]) -> list[float]:
        examples = self.encoding(rows)
        values = self.session.within_memory(
            lambda: values_of(self.session, self.policy, examples, self._logratio)
        )
        return finite(values)

    def _logratio(self, batch: Batch) -> torch.Tensor:
        with self.session.runtime.autocast():
            policy = sequence_logprobs(self.policy, batch)
            return self.beta * (policy - sequence_logprobs(self.reference, batch))


def implicit_reward(session: Session, stage: LabelConfig) -> Scorer:
    """The implicit reward of `model` against `stage.reference`, or its training reference."""
    source = session.config.model
    named = stage.reference or base_provenance(source).get("reference")
    if named is None:
        raise ConfigError(
            f"stage.reference=null: {source.path or source.hub_id} does not name the reference of "
            "its training; set stage.reference=<folder>"
        )
    if source.path is not None and Path(named).resolve() == Path(source.path).resolve():
        raise ConfigError(
            f"stage.reference={named}: is model.path itself, so every reward would be 0"
        )
    tokenizer = load_tokenizer(source)
    policy = load(session, source, tokenizer)
    models = policy, load_named(session, named, tokenizer)
    for model in models:
        model.to(session.runtime.device).eval().requires_grad_(False)  # type: ignore[arg-type]
    return ImplicitReward(session, *models, Encoding(session, policy, tokenizer), stage.beta)
