"""Win rates of policies against an opponent, part of stage=evaluate (stage.opponent)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo_cli.config import EvaluateConfig, HttpJudgeConfig
from dpo_cli.config.endpoint import endpoint_from_environment
from dpo_cli.data.dataset import load_splits
from dpo_cli.durable import write_text
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.evaluation.judge import (
    Decision,
    Judge,
    Match,
    RewardJudge,
    Verdict,
    without_verdict,
)
from dpo_cli.evaluation.judge_http import HttpJudge
from dpo_cli.model.sampling.generate import SamplingOptions
from dpo_cli.records import EncodedExample, Prompt, response_text
from dpo_cli.report.files import to_json, write_redacted_json
from dpo_cli.rewards.scorers import Completed, Scorer, as_text
from dpo_cli.session.lengths import new_tokens
from dpo_cli.session.models import load_named
from dpo_cli.session.sampling import completion_text, decoded_together, draw_samples
from dpo_cli.session.session import Session
from dpo_cli.statistics import win_rate

REFERENCE_TEMPERATURE = 1.0  # the KL is measured to this distribution


class Bench(Protocol):
    """The parts of `evaluation.bench.Bench` that win rates use.

    examples, prompts: the same prompts as token ids and as in their source.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...
    @property
    def reference(self) -> PreTrainedModel | None: ...
    @property
    def examples(self) -> Sequence[EncodedExample]: ...
    @property
    def prompts(self) -> Sequence[Prompt]: ...
    @property
    def score(self) -> Scorer | None: ...


def win_rates(session: Session, stage: EvaluateConfig, bench: Bench) -> WinRates | None:
    """The run's win rates; None without an opponent. Raises ConfigError."""
    if stage.opponent is None:
        return None
    if stage.opponent == "reference" and bench.reference is None:
        raise ConfigError("stage.opponent=reference: set stage.reference=<folder or hub id>")
    return WinRates(session, stage, bench, load_judge(session, bench.score))


def load_judge(session: Session, scorer: Scorer | None) -> Judge:
    """The configured judge. Raises ConfigError if its endpoint is not set."""
    config = session.config
    if isinstance(config.judge, HttpJudgeConfig):
        endpoint = endpoint_from_environment()
        return HttpJudge(config.judge, endpoint, Path(config.cache_dir), config.seed)
    assert scorer is not None  # checked with the configuration
    return RewardJudge(scorer, f"reward_fn={config.reward_fn.name}")


def decide(
    session: Session, judge: Judge, matches: Sequence[Match], tick: Callable[[int], None]
) -> list[Decision]:
    """The judge's decisions: only one rank asks a server, a reward is computed by all."""
    if isinstance(session.config.judge, HttpJudgeConfig):
        return session.ranks.from_first(lambda: judge(matches, tick))
    return judge(matches, tick)


@dataclass
class WinRates:
    """Policies against one opponent, by one judge with a common limit on calls.

    The opponent's completions: `chosen` is each row's first response; `reference` is sampled at
    temperature 1, independent of the policy's; another policy is sampled once per temperature.
    Opponents use another seed than policies, so a policy against itself wins half of the matches
    instead of tying in all.
    """

    session: Session
    stage: EvaluateConfig
    bench: Bench
    judge: Judge
    rows: list[dict[str, Any]] = field(default_factory=list)  # of win_rates.json
    verdicts: list[dict[str, Any]] = field(default_factory=list)  # of verdicts.jsonl

    def measure(self, policy: PreTrainedModel, label: str) -> dict[str, float]:
        """Judge every prompt at each of stage.win_temperatures.

        Returns `win_rate_t0.7` with its 95% interval, `_low` and `_high`, for each temperature;
        adds the policy to win_rates.json, verdicts.jsonl and plots/win_rates.png.
        Raises ConfigError if the judge's server rejects something that all requests have in common,
        DataError if there is no verdict at all.
        """
        figures: dict[str, float] = {}
        for temperature in dict.fromkeys(self.stage.win_temperatures):
            ours = self._sampled(policy, temperature, self.session.config.seed)
            row = self._play(ours, label, temperature)
            self.rows.append(row)
            name = f"win_rate_t{temperature:g}"
            figures |= {
                name: row["win_rate"],
                f"{name}_low": row["low"],
                f"{name}_high": row["high"],
            }
        self._write()
        return figures

    def _play(self, ours: Sequence[Completed], label: str, temperature: float) -> dict[str, Any]:
        """The row of win_rates.json for one policy at one temperature."""
        opponents = self._others[temperature]
        matches = [Match(a, b) for a, b in zip(ours, opponents, strict=True)]
        with self.session.progress.phase("judging", len(matches)) as tick:
            decisions = decide(self.session, self.judge, matches, tick)
        labels = {
            "policy": label, "opponent": str(self.stage.opponent), "judge": self.judge.name,
            "temperature": temperature,
        }  # fmt: skip
        for match, decision in zip(matches, decisions, strict=True):
            self.verdicts.append({
                "prompt": as_text(match.ours.prompt), **labels,
                "completion": match.ours.completion, "other": match.theirs.completion,
                "verdict": decision.verdict.value, "reason": decision.reason,
            })  # fmt: skip
        for line in without_verdict(decisions):
            self.session.note(line)
        counts = Counter(decision.verdict for decision in decisions)
        wins, losses, ties = (counts[v] for v in (Verdict.WIN, Verdict.LOSS, Verdict.TIE))
        if wins + losses + ties == 0:
            self._write_verdicts()
            raise DataError(
                f"judge {self.judge.name}: no verdict on any of {len(matches):,} matches of "
                f"{label} at temperature {temperature:g}: {decisions[0].reason}; start it again "
                "when the judge responds; its answers so far are cached"
            )
        rate = win_rate(wins, losses, ties)
        return {
            **labels, "wins": wins, "losses": losses, "ties": ties,
            "errors": counts[Verdict.ERROR], "unasked": counts[Verdict.UNASKED],
            "win_rate": rate.value, "low": rate.low, "high": rate.high,
        }  # fmt: skip

    @cached_property
    def _others(self) -> dict[float, list[Completed]]:
        """The opponent's completions at each of the policy's temperatures."""
        temperatures, opponent = self.stage.win_temperatures, self.stage.opponent
        assert opponent is not None
        if opponent == "chosen":
            return dict.fromkeys(temperatures, self._responses())
        seed = self.session.config.seed + 1
        if opponent == "reference":
            assert self.bench.reference is not None
            texts = self._sampled(self.bench.reference, REFERENCE_TEMPERATURE, seed)
            return dict.fromkeys(temperatures, texts)
        model = load_named(self.session, opponent, self.bench.tokenizer, "stage.opponent")
        model.to(self.session.runtime.device).eval()  # type: ignore[arg-type]
        return {t: self._sampled(model, t, seed) for t in dict.fromkeys(temperatures)}

    def _responses(self) -> list[Completed]:
        """The first response of each row as text, not truncated like its token ids."""
        config, bench = self.session.config, self.bench
        splits = load_splits(config.data, config.seed, bench.tokenizer)
        pairs = list(zip(bench.prompts, (e.row for e in bench.examples), strict=True))
        for rows in (splits.eval, splits.train):  # all prompts are from one split
            by_row = {row.row: row for row in rows}
            if all(row in by_row and by_row[row].prompt == prompt for prompt, row in pairs):
                return [
                    Completed(prompt, response_text(by_row[row].responses[0]))
                    for prompt, row in pairs
                ]
        raise AssertionError("prompts of another dataset")

    def _sampled(self, model: PreTrainedModel, temperature: float, seed: int) -> list[Completed]:
        """One completion per prompt."""
        stage, bench = self.stage, self.bench
        options = SamplingOptions(
            temperature=temperature,
            max_new_tokens=new_tokens(stage),
            seed=seed,
            batch_size=decoded_together(self.session, stage),
        )
        ids = [e.prompt_ids for e in bench.examples]
        phase = f"sampling at temperature {temperature:g}"
        with self.session.progress.phase(phase, len(ids)) as tick:
            drawn = draw_samples(self.session, model, bench.tokenizer, ids, options, tick)
        return [
            Completed(prompt, completion_text(bench.tokenizer, c.ids), c.finished)
            for prompt, (c,) in zip(bench.prompts, drawn, strict=True)
        ]

    def _write_verdicts(self) -> None:
        lines = "".join(to_json(row) + "\n" for row in self.verdicts)
        write_text(self.session.run_dir / "verdicts.jsonl", lines)

    def _write(self) -> None:
        folder = self.session.run_dir
        self._write_verdicts()
        write_redacted_json(folder / "win_rates.json", self.rows)
        if self.session.config.logger.plots:
            from dpo_cli.report.win_rates import draw_win_rates  # matplotlib is slow to import

            draw_win_rates(folder, self.rows)
