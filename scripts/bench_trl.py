"""TRL's side of `bench.py`: its own trainers on the same token ids, timed at their log.

Usage: `python bench_trl.py job.json result.json`

Imports nothing of dpo-run, so it also runs under the Python of another environment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
import transformers
import trl
from bench_job import Job, Window, synchronise, work

NAMES = {"margin": "rewards/margins"}  # TRL's name of a figure -> ours


class Recorder(transformers.TrainerCallback):
    """Hands each step's log to the window."""

    def __init__(self, window: Window) -> None:
        self.window = window

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            figures = {NAMES.get(name, name): value for name, value in logs.items()}
            self.window.end_of_step(state.global_step, figures)


class FixedOrder:
    """The rows in the order they have, as on the other side."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class DpoOnIds(FixedOrder, trl.DPOTrainer):
    """Takes rows that are token ids already, and times its pass over the reference."""

    reference_seconds: float | None = None

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        synchronise(self.args.device.type)
        self.reference_seconds = time.perf_counter() - started
        return dataset


class SftOnIds(FixedOrder, trl.SFTTrainer):
    """Takes token ids with a mask of the completion, as TRL documents it."""

    reference_seconds = None


class RewardOnIds(FixedOrder, trl.RewardTrainer):
    """Takes token ids as TRL's own tokenisation leaves them."""

    reference_seconds = None


def dpo_trainer(job: Job, **common: Any) -> Any:
    columns = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}
    rows = [{new: row[old] for new, old in columns.items()} for row in job.rows()]
    args = trl.DPOConfig(**arguments(job))
    return DpoOnIds(args=args, train_dataset=datasets.Dataset.from_list(rows), **common)


def sft_trainer(job: Job, **common: Any) -> Any:
    rows = [
        {
            "input_ids": row["prompt"] + row["chosen"],
            "completion_mask": [0] * len(row["prompt"]) + [1] * len(row["chosen"]),
        }
        for row in job.rows()
    ]
    args = trl.SFTConfig(completion_only_loss=True, **arguments(job))
    return SftOnIds(args=args, train_dataset=datasets.Dataset.from_list(rows), **common)


def reward_trainer(job: Job, **common: Any) -> Any:
    rows = [
        {f"{name}_ids": row["prompt"] + row[name] for name in ("chosen", "rejected")}
        for row in job.rows()
    ]
    args = trl.RewardConfig(**arguments(job))
    trainer = RewardOnIds(args=args, train_dataset=datasets.Dataset.from_list(rows), **common)
    assert len(trainer.train_dataset) == len(rows), "TRL leaves out rows above max_length"
    return trainer


TRAINERS: dict[str, Callable[..., Any]] = {
    "dpo": dpo_trainer,
    "sft": sft_trainer,
    "reward": reward_trainer,
}


def arguments(job: Job) -> dict[str, Any]:
    """TRL's defaults but for what must be equal on both sides, then this side's settings."""
    settings = dict(job.settings)
    attention = settings.pop("attn_implementation", None)
    equal = {
        "output_dir": f"{job.scratch}/trl",
        "per_device_train_batch_size": job.batch,
        "max_steps": job.total_steps,
        "learning_rate": job.lr,
        "bf16": job.precision == "bf16",
        "max_length": job.length,
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": job.device == "cuda",  # without CUDA it only warns
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    if attention is not None:
        equal["model_init_kwargs"] = {"attn_implementation": attention}
    return equal | settings


def measure(job: Job) -> dict[str, Any]:
    window = Window(job)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    trainer = TRAINERS[job.task](
        job, model=job.model, processing_class=tokenizer, callbacks=[Recorder(window)]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert trainer.args.gradient_accumulation_steps == 1
    if job.settings.get("precompute_ref_log_probs"):
        assert trainer.reference_seconds is not None, "the reference pass was not seen"
    return window.result(
        reference_seconds=trainer.reference_seconds,
        versions={"trl": trl.__version__, "transformers": transformers.__version__},
    )


if __name__ == "__main__":
    work(measure)
