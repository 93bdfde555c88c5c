"""What every stage is given, and the steps that several stages share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import ModelConfig, RunConfig
from dpo_cli.data.chat import is_chat
from dpo_cli.data.dataset import EncodedSplits, load_encoded
from dpo_cli.data.loader import StepPlan, plan_steps
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.model.adapters import Adaptation
from dpo_cli.model.attention import MOST_TOKENS, Placement, kernel_of, prepare
from dpo_cli.model.forward import compile_rows
from dpo_cli.model.generate import Completion, SamplingOptions, sample
from dpo_cli.model.load import context_length, load_model, load_tokenizer
from dpo_cli.model.recompute import recompute_blocks
from dpo_cli.model.source import model_folder
from dpo_cli.packing import pack_all, pack_share, pack_sorted
from dpo_cli.ranks import Ranks
from dpo_cli.records import Batch, EncodedExample, LossOutput
from dpo_cli.report.console import Progress
from dpo_cli.report.files import append_samples
from dpo_cli.report.sinks import Sink
from dpo_cli.shard import gathered, make_mesh, shard
from dpo_cli.stages.precision import hold_as_trained, refuse_rounding
from dpo_cli.train.checkpoint import Snapshot, load_provenance
from dpo_cli.train.memory import TokenBudget, within
from dpo_cli.train.runtime import Runtime
from dpo_cli.train.sharded import is_sharded
from dpo_cli.train.task import Totals

T = TypeVar("T")


class Stage(Protocol):
    """A stage is a function: do the work, return the figures for summary.json."""

    def __call__(self, session: Session) -> dict[str, Any]: ...


@dataclass
class Session:
    """One run: resolved configuration, where it writes, where it computes."""

    config: RunConfig
    run_dir: Path
    runtime: Runtime
    progress: Progress
    sinks: list[Sink]
    snapshot: Snapshot | None = None
    data_facts: dict[str, Any] = field(default_factory=dict)  # for the model card
    budget: TokenBudget = field(init=False)
    kernel: str = field(init=False, repr=False)  # of the trained model, known when it is loaded

    def __post_init__(self) -> None:
        configured = self.config.train.micro_batch_tokens
        tokens = self.runtime.micro_batch_tokens(configured)
        self.budget = TokenBudget(tokens, fixed=self.ranks.size > 1)

    @property
    def ranks(self) -> Ranks:
        return self.runtime.ranks

    @property
    def token_budget(self) -> int:
        """Most tokens of a row that is packed now."""
        return self.budget.tokens

    def within_memory(self, work: Callable[[], T]) -> T:
        """`work()`, a pass that only measures, in smaller rows where memory runs out."""
        return within(self.budget, self.runtime.device, self.note, work)

    @property
    def placement(self) -> Placement:
        half = self.runtime.precision == "bf16"
        return Placement(self.runtime.device, torch.bfloat16 if half else torch.float32, self.note)

    def begin(self, steps: int) -> None:
        self.progress.begin(steps, self.snapshot.step if self.snapshot else 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.write(step, values)

    def advance(self, step: int, values: Mapping[str, float]) -> None:
        self.progress.advance(step, values)

    def note(self, line: str) -> None:
        self.progress.note(line)


# (which, tokenizer, seed, the key that names it, where it will compute, how it is adapted)
# -> a model on the CPU, or quantised on its device
LoadModel = Callable[
    [ModelConfig, PreTrainedTokenizerFast, int, str, Placement, Adaptation | None], PreTrainedModel
]


@dataclass
class Loaded:
    """Policy, tokenizer and encoded rows of a training stage."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    splits: EncodedSplits
    base: dict[str, Any]  # provenance of the weights the run started from


def load(
    session: Session,
    source: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    key: str = "model.path",
    how: LoadModel = load_model,
    adaptation: Adaptation | None = None,
    as_trained: bool = False,
    before: Callable[[PreTrainedModel], None] = lambda model: None,
) -> PreTrainedModel:
    """A model for this run's device; the session's rows stay as short as its attention needs.

    as_trained: in the precision of the trained weights; else the reference would not be what
    the policy was at step 0. before: what is done to it before its weights are sharded.
    """
    model = how(source, tokenizer, session.config.seed, key, session.placement, adaptation)
    before(model)
    if session.config.hardware.compile:
        compile_rows(model)
    if kernel_of(model) in MOST_TOKENS:
        session.budget.limit(MOST_TOKENS[kernel_of(model)])
    if as_trained:
        hold_as_trained(model, session.config.hardware)
    if session.ranks.size > 1:
        spread_weights(session, model, key)
    return model


def spread_weights(session: Session, model: PreTrainedModel, key: str) -> None:
    """Shard a loaded model over the ranks. ConfigError for one whose forwards differ by rank."""
    if kernel_of(model) == "plain":  # as many forwards as a row needs
        raise ConfigError(
            f"{key}: {type(model).__name__} runs with attention=plain, which several devices "
            "cannot share: use hardware.devices=1"
        )
    hardware = session.config.hardware
    nodes = max(1, session.ranks.size // hardware.devices)
    mesh = make_mesh(session.runtime.device.type, hardware.devices, nodes, hardware.sharding)
    shard(model, mesh, session.placement.dtype)


def load_policy_and_data(
    session: Session,
    how: LoadModel = load_model,
    before: Callable[[PreTrainedModel], None] = lambda model: None,
) -> Loaded:
    """The model to train (from the checkpoint when resuming) and the encoded splits.

    before: what is done to the model before its weights are sharded.
    """
    config = session.config
    refuse_rounding(config.hardware, session.runtime)
    tokenizer = load_tokenizer(config.model)
    source, saved, adaptation = config.model, session.snapshot, None
    whole = None if saved is None or is_sharded(saved.folder) else saved.folder
    if config.lora.name != "none":
        adaptation = Adaptation(config.lora, whole)
    elif whole is not None:
        source = replace(source, path=str(whole))
    model = load(session, source, tokenizer, "model.path", how, adaptation, True, before)
    session.kernel = kernel_of(model)
    if every := config.hardware.activation_checkpointing:
        recompute_blocks(model, every)
    splits = load_data(session, context_length(model), tokenizer)
    if not splits.train:
        raise DataError(f"data={config.data.name}: no training rows are left")
    return Loaded(model, tokenizer, splits, base_provenance(config.model))


def load_named(
    session: Session,
    named: str,
    tokenizer: PreTrainedTokenizerFast,
    key: str = "stage.reference",
    as_trained: bool = False,
) -> PreTrainedModel:
    """Another model by folder or hub id, for the same token ids as the policy's."""
    source = named_source(session.config.model, named, key)
    if load_tokenizer(source, key).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{key}={named}: has another tokenizer than model={session.config.model.name}; its "
            "log-probabilities would be of other texts"
        )
    return load(session, source, tokenizer, key, as_trained=as_trained)


def named_source(config: ModelConfig, named: str, key: str = "stage.reference") -> ModelConfig:
    """Where another model is, read in the way of the run's own."""
    local = model_folder(named, key) if Path(named).is_dir() else None
    return replace(
        config, architecture=None, revision=None, tokenizer=None,
        path=str(local) if local else None, hub_id=None if local else named,
    )  # fmt: skip


def base_provenance(config: ModelConfig) -> dict[str, Any]:
    return load_provenance(model_folder(config.path)) if config.path else {}


def load_data(
    session: Session, context: int, tokenizer: PreTrainedTokenizerFast, announce: bool = True
) -> EncodedSplits:
    """Encoded rows for a model of that context length; `announce` says what was dropped."""
    config = session.config
    splits = load_encoded(config.data, tokenizer, context, config.seed, Path(config.cache_dir))
    for line in splits.drops.summary_lines() if announce else []:
        session.note(line)
    session.data_facts = {
        "name": config.data.name, "hub_id": config.data.hub_id, "path": config.data.path,
        "revision": splits.revision, "fingerprint": splits.fingerprint,
        "train_rows": len(splits.train), "eval_rows": len(splits.eval),
        "chat": is_chat(splits.train, tokenizer),
    }  # fmt: skip
    return splits


def step_plan(session: Session, rows: int) -> StepPlan:
    train = session.config.train
    plan = plan_steps(
        rows, train.batch_size, train.epochs, train.max_steps, train.shuffle, session.config.seed
    )
    if left := plan.left_out(train.epochs):
        session.note(f"{plan.steps:,} steps of {plan.batch_size}{left}")
    return plan


def batches_of(
    session: Session, examples: Sequence[EncodedExample], plan: StepPlan, keep_last: bool = False
) -> Callable[[int], list[Batch]]:
    """step -> its micro-batches, each at most the token budget, ready for the trained model."""

    return lambda step: packed_rows(session, examples, plan.indices(step), keep_last)


def packed_rows(
    session: Session,
    examples: Sequence[EncodedExample],
    indices: Sequence[int],
    keep_last: bool = False,
) -> list[Batch]:
    """This rank's micro-batches of the given examples, ready for the trained model."""
    budget, ranks = session.token_budget, session.ranks
    if ranks.size == 1:
        rows = pack_all(examples, indices, budget, keep_last)
    else:
        rows = pack_share(examples, indices, budget, ranks.rank, ranks.size, keep_last)
    return [prepare(row, session.kernel) for row in rows]


def over_rows(
    session: Session,
    examples: Sequence[EncodedExample],
    compute: Callable[[Batch], T],
    keep_last: bool = False,
    tick: Callable[[int], None] = lambda examples: None,
) -> Iterable[tuple[Batch, T]]:
    """Packed rows of all examples, and what `compute` makes of each on the run's device.

    The ranks share the work: what is computed is sent to all of them, its tensors on the CPU.
    """

    def computed(row: Batch) -> T:
        with session.runtime.autocast():
            made = compute(row.to(session.runtime.device))
        tick(len(row.example_ids) * session.ranks.size)
        return made

    rows = pack_sorted(examples, session.token_budget, keep_last)
    if session.ranks.size == 1:  # one row after the other, none of them kept
        return ((row, computed(row)) for row in rows)
    listed = list(rows)
    return zip(listed, session.ranks.spread(listed, computed), strict=True)


def mean_figures(
    session: Session,
    examples: Sequence[EncodedExample],
    compute: Callable[[Batch], LossOutput],
) -> dict[str, float]:
    """A loss and its figures over all examples; empty without any."""
    totals, travels = Totals(), session.ranks.size > 1
    made = over_rows(session, examples, lambda r: compute(r).on_cpu() if travels else compute(r))
    for _, out in made:
        totals.add(out)
    return totals.means() if totals.sums else {}


def keep_responses(examples: Sequence[EncodedExample], count: int) -> list[EncodedExample]:
    """The best `count` responses of each example."""
    return [replace(e, response_ids=e.response_ids[:count]) for e in examples]


def distinct_responses(examples: Sequence[EncodedExample]) -> int:
    """How many samples the rows were made of: a response may be in several pairs."""
    return len({(e.prompt_ids.tobytes(), r.tobytes()) for e in examples for r in e.response_ids})


def check_lengths(examples: Sequence[EncodedExample], branches: int, stage: str) -> None:
    for example in examples:
        if len(example.response_ids) < branches:
            raise DataError(
                f"stage={stage}: row {example.row} has {len(example.response_ids)} response(s), "
                f"{branches} are needed: give chosen and rejected (data.rejected_field=...)"
            )


def sample_writer(session: Session, loaded: Loaded) -> Callable[[int], None]:
    """on_eval: completions of the same held-out prompts, appended to samples.jsonl."""
    train, tokenizer = session.config.train, loaded.tokenizer
    pool = loaded.splits.eval or loaded.splits.train
    prompts = [e.prompt_ids for e in pool[: train.sample_prompts]]
    options = SamplingOptions(
        temperature=train.sample_temperature,
        max_new_tokens=train.sample_max_new_tokens,
        seed=session.config.seed,
    )

    def write(step: int) -> None:
        if not prompts:
            return
        rows = complete(session, loaded.model, tokenizer, prompts, options)
        append_samples(session.run_dir, step, [r[0] for r in rows])

    return write


def draw_samples(
    session: Session,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[np.ndarray],
    options: SamplingOptions,
    tick: Callable[[int], None] = lambda prompts: None,
) -> list[list[Completion]]:
    """`options.completions` samples of each prompt, computed in the run's precision."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert eos is not None and pad is not None
    ranks = session.ranks
    with session.runtime.autocast(), gathered(model):
        mine = sample(model, prompts, options, eos, pad, tick, (ranks.rank, ranks.size))
    if ranks.size == 1:
        return mine
    shares = ranks.gather(mine)
    return [next((row for row in rows if row), []) for rows in zip(*shares, strict=True)]


def complete(
    session: Session,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[np.ndarray],
    options: SamplingOptions,
    tick: Callable[[int], None] = lambda prompts: None,
) -> list[list[dict[str, Any]]]:
    """Samples as readable rows {prompt, completion, finished, tokens}, a list a prompt."""
    samples = draw_samples(session, model, tokenizer, prompts, options, tick)
    return [
        [
            {
                "prompt": text_of(tokenizer, prompt),
                "completion": completion_text(tokenizer, c.ids),
                "finished": c.finished,
                "tokens": len(c.ids),
            }
            for c in row
        ]
        for prompt, row in zip(prompts, samples, strict=True)
    ]


def text_of(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    """Token ids as text, special tokens left out."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


def completion_text(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    """Sampled ids as the text that continues a prompt, special tokens left out.

    Decoded behind an anchor: sentencepiece takes the space off whatever begins a text.
    """
    anchor, before = _anchor(tokenizer)
    whole = text_of(tokenizer, np.concatenate([anchor, ids]))
    return whole[len(before) :] if whole.startswith(before) else text_of(tokenizer, ids)


@lru_cache(maxsize=8)
def _anchor(tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, str]:
    """Ids of a text, and what they are decoded to."""
    ids = np.array(tokenizer("a", add_special_tokens=False).input_ids, np.int32)
    return ids, text_of(tokenizer, ids)
