"""The training loop: every stage that trains calls `fit`.

A stage passes a `TrainTask`: its model, the micro-batches of a step, and the loss of one. The loop
accumulates gradients, divides once by the step's total weight, clips, steps, evaluates, logs and
saves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim import Optimizer

from dpo_cli.config import RunConfig, spec_of
from dpo_cli.distributed.fsdp import reshard
from dpo_cli.distributed.ranks import Ranks
from dpo_cli.errors import ConfigError, NonFiniteError, Preempted
from dpo_cli.records import Batch
from dpo_cli.train import checkpoint
from dpo_cli.train.flops import Sizes, peak_tflops, sizes_of, speed_figures
from dpo_cli.train.guard import StopRequest
from dpo_cli.train.memory import within
from dpo_cli.train.optim import (
    build_optimizer,
    learning_rate,
    sum_over_ranks,
    take_step,
    warmup_steps,
)
from dpo_cli.train.prefetch import prefetched
from dpo_cli.train.rounding import changed_share, rounding_note, watch
from dpo_cli.train.runtime import Runtime
from dpo_cli.train.saving import Best, Saves
from dpo_cli.train.step import accumulate
from dpo_cli.train.task import TrainingSession, TrainTask


@dataclass
class Fit:
    """The state of a training run."""

    task: TrainTask
    session: TrainingSession
    optimizer: Optimizer
    saves: Saves
    batches: Callable[[int], Sequence[Batch]]  # the task's, prefetched on CUDA
    sizes: Sizes | None  # of the model, if its FLOPs are known
    peak: float | None  # TFLOP/s of the device, if known
    step: int = 0
    best: Best | None = None
    before: dict[str, float] = field(default_factory=dict)  # figures of the last before_step
    due: set[str] = field(default_factory=set)  # of evaluate, save: at the next save_multiple

    @property
    def config(self) -> RunConfig:
        return self.session.config

    @property
    def runtime(self) -> Runtime:
        return self.session.runtime


def fit(task: TrainTask, session: TrainingSession) -> None:
    """Train to the last step, from the session's snapshot if it has one, and publish `final/`;
    metrics go to the session.

    Raises NonFiniteError before a step with a non-finite gradient is taken, and Preempted after a
    signal, with the state saved.
    """
    config, runtime, snapshot = session.config, session.runtime, session.snapshot
    assert config.optim.lr is not None
    run_dir = Path(config.run_dir)
    task.trained.to(runtime.device)
    reshard(task.model)
    optimizer = build_optimizer(
        task.model, config.optim, config.optim.lr, task.heads, task.heads_lr_scale
    )
    run = Fit(
        task, session, optimizer, Saves(task, session, optimizer), task.batches,
        sizes_of(task.model), peak_tflops(runtime.device, runtime.precision),
    )  # fmt: skip
    ranks = runtime.ranks
    task.identity["precision"] = runtime.precision
    if snapshot is not None:
        _check_identity(snapshot, task, session)
        checkpoint.restore(snapshot, task.model, optimizer, task.heads)
        run.step, run.best = snapshot.step, snapshot.state["best"]
        run.saves.best_saved = snapshot.state.get("best_saved", run.best)
        task.budget.restore(snapshot.state.get("micro_batch_tokens"))
    check_ranks_agree(ranks, task)
    on_policy = task.before_step is not None  # batches do not exist before the step
    ahead = prefetched(task.batches, task.steps, runtime.device, task.budget)
    batches = nullcontext(task.batches) if on_policy else ahead
    with StopRequest().watching() as stop, run.saves, batches as run.batches:
        if run.step == 0:
            _evaluate(run)
        while run.step < task.steps:
            _after_step(run, _train_step(run), stop)
    checkpoint.save_final(
        run_dir / "final", task.model, task.tokenizer, task.provenance, ranks, task.files
    )


def check_ranks_agree(ranks: Ranks, task: TrainTask) -> None:
    """ConfigError if ranks would compute different things and deadlock."""
    plans = ranks.gather({**task.identity, "steps": task.steps, "budget": task.budget.tokens})
    for rank, plan in enumerate(plans):
        for name, value in plan.items():
            if value != plans[0][name]:
                raise ConfigError(
                    f"rank {rank} has another {name} than rank 0 ({value} instead of "
                    f"{plans[0][name]}): give all nodes the same files and package versions"
                )


def _check_identity(
    snapshot: checkpoint.Snapshot, task: TrainTask, session: TrainingSession
) -> None:
    saved = snapshot.state["identity"]
    changed = {
        name: f"{name}: {saved[name][:12]} -> {now[:12]}"
        for name, now in task.identity.items()
        if saved.get(name, now) != now  # older checkpoints have no base
    }
    if session.config.model.other_base and "base" in changed:
        session.note(f"resume: over another base ({changed.pop('base')})")
    if changed:
        key = "set model.other_base=true, " * (list(changed) == ["base"])
        raise ConfigError(
            f"resume: {snapshot.folder} is from a different run ({'; '.join(changed.values())}): "
            f"restore what changed, {key}or start a new run in another run_dir"
        )


def _train_step(run: Fit) -> dict[str, float]:
    config, task = run.config, run.task
    if task.before_step is not None:
        run.before = task.before_step(run.step) or run.before
    started = time.perf_counter()
    lr = learning_rate(config.optim, config.optim.lr or 0.0, run.step, task.steps)
    task.model.train()
    run.runtime.seed_rank(config.seed, run.step)
    sums = accumulate(task, lambda: run.batches(run.step), run.runtime, run.session.note)
    if not sums.totals.sums:  # no micro-batch on any rank
        run.step += 1
        return {"lr": lr, **run.before}
    ranks = run.runtime.ranks
    values = sums.totals.means(ranks)
    weight = sums.totals.weights["loss"]
    sum_over_ranks(task.trained, ranks)
    first = run.step + 1 == max(1, warmup_steps(config.optim, task.steps))
    watched = watch(task.trained.parameters()) if first else []
    try:
        norm = take_step(task.trained, run.optimizer, weight, config.optim.max_grad_norm, lr)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"step {run.step + 1}: {error} (loss {values['loss']}); no step was taken; "
            f"{_remedy(run)}"
        ) from None
    if note := rounding_note(changed_share(watched), lr):
        run.session.note(note)
    run.step += 1
    seconds = time.perf_counter() - started
    values |= {
        "lr": lr,
        "grad_norm": norm,
        "step_seconds": seconds,
        "tokens_per_second": ranks.total([sums.tokens])[0] / seconds,
        f"{task.unit}_per_second": ranks.total([sums.examples])[0] / seconds,
        **speed_figures(run.sizes, sums.batches, task.live_references, seconds, run.peak, ranks),
        "peak_memory_mb": run.runtime.peak_memory_mb(),
        **run.before,
    }
    if task.budget.lowered:
        values["micro_batch_tokens"] = task.budget.tokens
    return values


def _after_step(run: Fit, values: dict[str, float], stop: StopRequest) -> None:
    train, last = run.config.train, run.step == run.task.steps
    if last or run.step % train.log_every_steps == 0:
        run.session.write(run.step, values)
    run.session.advance(run.step, values)
    run.saves.poll()
    if last or is_due(run.step, train.eval_every_steps, run.task.steps):
        run.due.add("evaluate")
    every = train.save_every_steps
    if last or (run.saves.due() if every is None else is_due(run.step, every, run.task.steps)):
        run.due.add("save")
    if not last and run.step % run.task.save_multiple:
        return
    signal = stop.received(run.runtime.ranks)
    if run.due or signal:
        _check_weights(run)
    improved = "evaluate" in run.due and _evaluate(run)
    if signal or "save" in run.due or (improved and run.saves.affords(run.best)):
        run.saves.save(run.step, run.best, last=last or signal is not None)
    run.due.clear()
    if signal and not last:
        raise Preempted(
            f"stopped by {signal} after step {run.step} of {run.task.steps}, state saved; "
            f"continue with: dpo-run resume={run.config.run_dir}"
        )


def is_due(step: int, every: int | None, total: int) -> bool:
    """every: interval in steps; None: a tenth of the run; 0: only at the end."""
    if every == 0:
        return False
    return step % (every or max(1, math.ceil(total / 10))) == 0


def _evaluate(run: Fit) -> bool:
    """Evaluate and sample the held-out rows. True if the best metric improved."""
    run.task.model.eval()
    with torch.no_grad(), run.runtime.autocast():
        figures = within(run.task.budget, run.runtime.device, run.session.note, run.task.evaluate)
    bad = [name for name, value in figures.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(
            f"step {run.step}: held-out {', '.join(bad)} is not finite; {_remedy(run)}"
        )
    run.task.on_eval(run.step)
    named = {f"eval/{k}": v for k, v in figures.items()}
    if named:
        run.session.write(run.step, named)
        run.session.advance(run.step, named)
    name = run.config.train.best_metric
    if name not in figures or run.step == 0:
        return False
    sign = 1.0 if spec_of(run.config.stage).best_metrics[name] == "lowest" else -1.0
    better = run.best is None or sign * figures[name] < sign * run.best["value"]
    better = run.runtime.ranks.from_first(lambda: better)
    if better:
        run.best = {"step": run.step, "value": figures[name]}
    return better


def _check_weights(run: Fit) -> None:
    """Run a forward on the new weights: a step that broke them shows only there."""
    batches = run.task.batches(run.step - 1)
    if not batches:  # no step was taken
        return
    run.task.model.eval()
    with torch.no_grad(), run.runtime.autocast():
        loss = run.task.compute_loss(batches[0].to(run.runtime.device)).loss_sum
    if run.runtime.ranks.any(not torch.isfinite(loss)):
        raise NonFiniteError(
            f"step {run.step}: the loss after this step is {float(loss)}, so it was not saved; "
            f"{_remedy(run)}"
        )


def _remedy(run: Fit) -> str:
    run.saves.wait_quietly()
    steps = checkpoint.steps_in(Path(run.config.run_dir) / "checkpoints")
    saved = f"step-{steps[-1]} is the last checkpoint" if steps else "no checkpoint was saved yet"
    return f"{saved}: try a lower optim.lr (now {run.config.optim.lr:g})"
