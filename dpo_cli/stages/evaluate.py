"""stage=evaluate: reward, sequence KL to the reference, distance to the optimum, win rates."""

from __future__ import annotations

import gc
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cli.config import EvaluateConfig, HttpJudgeConfig, RunConfig
from dpo_cli.config.endpoint import endpoint_from_environment
from dpo_cli.config.run_data import data_line
from dpo_cli.data.dataset import EncodedSplits
from dpo_cli.durable import encode, write_bytes
from dpo_cli.errors import ConfigError
from dpo_cli.evaluation import optimum
from dpo_cli.evaluation.bench import Bench, set_up
from dpo_cli.evaluation.measure import (
    Tick,
    divergence_figures,
    divergences,
    preference_accuracy,
    reward_figures,
    scored,
    text_figures,
    texts_of,
)
from dpo_cli.evaluation.optimum import Optimum
from dpo_cli.evaluation.policies import PolicyPoint, find_policies, reference_of
from dpo_cli.evaluation.win_rate import WinRates, win_rates
from dpo_cli.model.load import load_tokenizer
from dpo_cli.model.sampling.generate import Completion, SamplingOptions
from dpo_cli.model.source import model_folder
from dpo_cli.report.files import to_json
from dpo_cli.rewards.scorers import as_text
from dpo_cli.rewards.scoring import scorer_digest, scoring_rows
from dpo_cli.session.lengths import new_tokens, unfinished_line
from dpo_cli.session.models import load
from dpo_cli.session.preview import Preview, Row, data_rows, device_row, model_rows
from dpo_cli.session.prompts import write_rows
from dpo_cli.session.sampling import decoded_together, draw_samples
from dpo_cli.session.session import Session
from dpo_cli.session.trained import trained_share
from dpo_cli.session.workload import Workload, sampling_workload

WIN_RATE = r"win_rate_t[\d.e+-]+"  # without its interval, _low and _high
ROUND = 128  # completions per prompt and round, if GPU memory determines the number of prompts
NO_REFERENCE = "none: the KL is not measured (stage.reference)"
SAVED_SAMPLES = 8  # per policy; of the last one, all samples are saved


def run(session: Session) -> dict[str, Any]:
    """Sample from each policy on the same held-out prompts; one row per policy in points.jsonl."""
    stage = cast(EvaluateConfig, session.config.stage)
    points = find_policies(session.config, session.note)
    bench = set_up(session, stage, points)
    stage = bench.stage
    wins = win_rates(session, stage, bench)
    best = find_optimum(session, stage, bench)
    label = bench.reference_path or ""
    rows = optimum.point_rows(
        best, stage.best_of, label, session.config.seed, session.note
    ) if best else []  # fmt: skip
    extra, samples, measured = len(rows), [], []
    passes = 1 if bench.reference is None or stage.temperature != 1.0 else 2
    total = len(points) * len(bench.examples) * passes
    with session.progress.phase("evaluating", total) as tick:
        for number, point in enumerate(points, start=1):
            figures, drawn = measure(session, stage, bench, point, best, wins, tick)
            free_policy(session)
            measured.append(figures)
            rows.append(point.row(figures))
            write_points(session.run_dir / "points.jsonl", rows)
            drawn = [{**row, "policy": point.label} for row in drawn]
            samples += drawn if number == len(points) else drawn[:SAVED_SAMPLES]
            write_rows(session.run_dir / "samples.jsonl", samples)
            if len(points) > 1:
                session.note(f"{number}/{len(points)}  {brief_line(point, figures)}")
    if len(points) > 1 and "kl" in measured[0]:
        override = shlex.quote(f"stage.evaluations=[{session.run_dir}]")
        session.note(f"to plot them: dpo-run stage=frontier {override}")
    return measured[0] if len(points) == 1 else overview(rows[extra:])


def plan(preview: Preview) -> Iterator[Row]:
    config, stage = preview.config, cast(EvaluateConfig, preview.config.stage)
    yield "stage", "evaluate"
    yield from scoring_rows(config)
    yield from sampling_rows(config, stage)
    notes: list[str] = []
    points = find_policies(config, notes.append)
    for line in notes:
        yield "", line
    if stage.policies:
        yield "policies", f"{len(points):,}, the first of them:"
        preview.use(points[0].source)
    yield from model_rows(preview)
    yield "reference", reference_of(stage, points) or NO_REFERENCE
    if settings := data_line(config):
        yield "", settings
    yield from data_rows(preview)
    yield device_row(preview)


def sampling_rows(config: RunConfig, stage: EvaluateConfig) -> Iterator[Row]:
    """The number of samples per policy and of requests to a judge."""
    yield "samples", f"up to {stage.prompts:,} prompts x {stage.completions:,} per policy"
    if stage.reference_samples:
        yield "", f"{stage.reference_samples:,} per prompt, of the reference"
    if stage.opponent is None:
        return
    judge = config.judge
    yield "win rates", f"against {stage.opponent}, by judge={judge.name}"
    if isinstance(judge, HttpJudgeConfig):
        requests = stage.prompts * len(stage.win_temperatures) * (1 + judge.both_orders)
        server = f"{judge.model} at {endpoint_from_environment().host}"
        limit = f"at most {judge.max_calls:,} in total"
        yield "", f"{server}: up to {requests:,} requests per policy, {limit}"


def workload(config: RunConfig, splits: EncodedSplits) -> Workload:
    return sampling_workload(cast(EvaluateConfig, config.stage), splits)


def load_policy(session: Session, bench: Bench, point: PolicyPoint) -> PreTrainedModel:
    """The policy's model on the device; the reference's if they are the same. ConfigError if its
    tokenizer differs."""
    if bench.reference is not None and is_reference(bench, point):
        return bench.reference
    key = "stage.policies" if cast(EvaluateConfig, session.config.stage).policies else "model.path"
    if load_tokenizer(point.source, key).get_vocab() != bench.tokenizer.get_vocab():
        raise ConfigError(
            f"{key}={point.label}: its tokenizer differs from the first policy's; evaluate it in a "
            "separate run"
        )
    policy = load(session, point.source, bench.tokenizer, key)
    return policy.to(session.runtime.device).eval()  # type: ignore[arg-type]


def free_policy(session: Session) -> None:
    """Free a policy's memory: the modules of a model form reference cycles, which only the garbage
    collector frees."""
    gc.collect()
    if session.runtime.device.type == "cuda":
        torch.cuda.empty_cache()


def is_reference(bench: Bench, point: PolicyPoint) -> bool:
    """Whether the policy is the reference, by its folder."""
    path, reference = point.source.path, bench.reference_path
    if path is None or reference is None or not Path(reference).is_dir():
        return False
    return model_folder(reference).resolve() == model_folder(path).resolve()


def measure(
    session: Session, stage: EvaluateConfig, bench: Bench, point: PolicyPoint,
    best: Optimum | None, wins: WinRates | None, tick: Tick,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """A policy's figures, and its samples as readable rows."""
    policy = load_policy(session, bench, point)
    samples = draw(session, bench, policy, stage, stage.completions, session.config.seed, tick)
    texts = texts_of(bench.tokenizer, samples)
    rewards = None if bench.score is None else scored(bench.score, bench.prompts, texts, samples)
    figures: dict[str, Any] = bench.facts() | reward_figures(rewards) | text_figures(texts, samples)
    if line := unfinished_line(figures["finished"], new_tokens(stage)):
        session.note(f"{point.label}: {line}")
    figures |= trained_share(bench.examples, bench.models.get(point.label))
    if bench.reference is not None and stage.temperature == 1.0:
        kls = divergences(session, policy, bench.reference, bench.examples, samples, tick)
        figures |= divergence_figures(*kls)
        if best is not None and rewards is not None:
            figures |= optimum.shortfall(best, rewards.mean(1), kls[0])
    if bench.pairs:
        figures |= preference_accuracy(session, policy, bench.reference, bench.pairs)
    if wins is not None:
        figures |= wins.measure(policy, point.label)
    return figures, sample_rows(bench, texts, rewards)


def sample_rows(
    bench: Bench, texts: Sequence[Sequence[str]], rewards: np.ndarray | None
) -> list[dict[str, Any]]:
    """{prompt, completion} of each sample, with its reward if there is one."""
    rows = [
        {"prompt": as_text(prompt), "completion": text}
        for prompt, row in zip(bench.prompts, texts, strict=True)
        for text in row
    ]
    if rewards is None:
        return rows
    scores = rewards.reshape(-1).tolist()
    return [{**row, "reward": score} for row, score in zip(rows, scores, strict=True)]


def draw(
    session: Session, bench: Bench, model: PreTrainedModel, stage: EvaluateConfig,
    completions: int, seed: int, tick: Tick,
) -> list[list[Completion]]:  # fmt: skip
    """`completions` samples of each prompt."""
    options = SamplingOptions(
        completions=completions,
        temperature=stage.temperature,
        max_new_tokens=new_tokens(stage),
        seed=seed,
        batch_size=decoded_together(session, stage),
    )
    prompts = [e.prompt_ids for e in bench.examples]
    return draw_samples(session, model, bench.tokenizer, prompts, options, tick)


def find_optimum(session: Session, stage: EvaluateConfig, bench: Bench) -> Optimum | None:
    """The optimum, measured on samples of the reference or read from an earlier evaluation."""
    if (
        bench.reference is None
        or bench.score is None
        or not (stage.reference_samples or stage.optimum)
    ):
        return None
    weights = scorer_digest(bench.score)
    identity = optimum.identity(
        stage, session.config.reward_fn, weights, bench.reference, bench.examples
    )
    if stage.optimum is not None:
        return optimum.load(stage.optimum, identity)
    rewards = reference_rewards(session, stage, bench, bench.reference)
    return optimum.measure(session, stage, rewards, identity)


def reference_rewards(
    session: Session, stage: EvaluateConfig, bench: Bench, reference: PreTrainedModel
) -> np.ndarray:
    """(prompts, stage.reference_samples) rewards, drawn in rounds of at most a decoded batch."""
    per_prompt = stage.reference_samples
    samples: list[list[Completion]] = [[] for _ in bench.examples]
    round_size = decoded_together(session, stage) or ROUND
    total = len(bench.examples) * -(-per_prompt // round_size)
    with session.progress.phase("sampling the reference", total) as tick:
        for number, start in enumerate(range(0, per_prompt, round_size)):
            count = min(round_size, per_prompt - start)
            # Separate random streams: the policies' samples use the seed itself.
            state = np.random.SeedSequence([session.config.seed, number]).generate_state(1)
            drawn = draw(session, bench, reference, stage, count, int(state[0]), tick)
            samples = [[*row, *new] for row, new in zip(samples, drawn, strict=True)]
    assert bench.score is not None
    texts = texts_of(bench.tokenizer, samples)
    return scored(bench.score, bench.prompts, texts, samples)


def write_points(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines atomically; NaN as null."""
    write_bytes(path, encode("".join(to_json(row) + "\n" for row in rows)))


def brief_line(point: PolicyPoint, figures: dict[str, Any]) -> str:
    """A policy's figures in one line of the log."""
    line = point.label
    if "reward" in figures:
        line += f"  reward {figures['reward']:.3f} ± {figures['reward_se']:.3f}"
    if "kl" in figures:
        line += f"  KL {figures['kl']:.2f} ± {figures['kl_se']:.2f}"
    if "shortfall" in figures:
        line += f"  shortfall {'at least ' * figures['beyond_optimum']}{figures['shortfall']:.3f}"
    for name, value in figures.items():
        if re.fullmatch(WIN_RATE, name) and value is not None:
            line += f"  {name} {value:.1%}"
    return line


def overview(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of several policies: their number, and those of the policy with the highest reward;
    without a reward only their number."""
    if any(row["reward"] is None for row in rows):
        return {"policies": len(rows)}
    best = max(rows, key=lambda row: float(row["reward"]))
    names = ["policy", "setting", "step", "reward", "reward_se", "kl", "kl_se", "shortfall"]
    names += [name for name in best if name.startswith("win_rate_t")]
    prompts = {name: best[name] for name in ("prompts",) if name in best}
    best_figures = {f"best_{name}": best[name] for name in names if best[name] not in (None, "")}
    return {"policies": len(rows), **prompts, **best_figures}
