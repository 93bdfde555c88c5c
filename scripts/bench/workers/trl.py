"""TRL's side: its trainers on the same token ids, timed in their log callback.

Imports nothing of dpo-run, so it also runs in another Python environment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from scripts.bench.job import UNAVAILABLE, Job, Window, work
from scripts.bench.lora import start_equal, trainer_arguments
from scripts.common import synchronize

try:
    import datasets
    import torch
    import transformers
    import trl
    from trl.trainer import dpo_trainer as dpo_trainer_module

    TRAINER_CLASSES = trl.DPOTrainer, trl.SFTTrainer, trl.RewardTrainer  # imported only when named
except (ImportError, RuntimeError) as error:  # transformers' lazy modules raise the latter
    raise SystemExit(f"{UNAVAILABLE}{type(error).__name__}: {error}") from error

NAMES = {"margin": "rewards/margins"}  # TRL's name of a figure -> ours
OF_MODELS = ("attn_implementation", "dtype", "use_kernels")  # settings for loading the model


class Recorder(transformers.TrainerCallback):
    """Passes each step's log to the window."""

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
    """Yields the rows in their order, as on the other side."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class DpoOnIds(FixedOrder, trl.DPOTrainer):
    """Takes rows of token ids, and times its pass over the reference."""

    reference_seconds: float | None = None

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        synchronize(self.args.device.type)
        self.reference_seconds = time.perf_counter() - started
        return dataset


class SftOnIds(FixedOrder, trl.SFTTrainer):
    """Takes token ids with a completion mask, as documented by TRL."""

    reference_seconds = None


class RewardOnIds(FixedOrder, trl.RewardTrainer):
    """Takes token ids in the format of TRL's tokenization."""

    reference_seconds = None


def dpo_trainer(job: Job, **common: Any) -> Any:
    names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    # From a file, as ranks look for each other's reference log-probabilities next to it.
    rows = datasets.Dataset.from_json(job.ids, cache_dir=f"{job.scratch}/rows")
    args = trl.DPOConfig(**arguments(job))
    trainer = DpoOnIds(args=args, train_dataset=rows.rename_columns(names), **common)
    configured, does = (getattr(of, "padding_free", False) for of in (args, trainer))
    assert configured == does, f"TRL {trl.__version__} pads anyway"
    return trainer


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
    assert len(trainer.train_dataset) == len(rows), "TRL drops rows above max_length"
    return trainer


TRAINERS: dict[str, Callable[..., Any]] = {
    "dpo": dpo_trainer,
    "sft": sft_trainer,
    "reward": reward_trainer,
}


def arguments(job: Job) -> dict[str, Any]:
    """TRL's defaults except settings that must be equal on both sides, then the side's own
    settings."""
    settings = {key: value for key, value in job.settings.items() if key != "regional"}
    model = {key: settings.pop(key) for key in OF_MODELS if key in settings}
    parts = job.devices * settings.get("gradient_accumulation_steps", 1)
    assert job.batch % parts == 0, f"batches of {job.batch} cannot be split into {parts}"
    equal = {
        "output_dir": f"{job.scratch}/trl",
        "per_device_train_batch_size": job.batch // parts,
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
    if model:
        equal["model_init_kwargs"] = model
    return equal | settings


def set_up(job: Job) -> None:
    """Settings of TRL that are not arguments."""
    if job.settings.get("regional"):  # as `accelerate launch --dynamo_use_regional_compilation`
        os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"
    if job.settings.get("use_liger_kernel"):
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        family = transformers.AutoConfig.from_pretrained(job.model).model_type
        if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise SystemExit(f"error: Liger has no kernels for {family}")
    if hasattr(dpo_trainer_module, "hash_module"):
        # Names the file of the reference's log-probabilities after all weights: 28 GB through
        # SHA-256 at 7B. The file is new in each of our processes, whatever its name.
        dpo_trainer_module.hash_module = lambda module: "one process"


def measure(job: Job) -> dict[str, Any]:
    window = Window(job)
    set_up(job)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    trainer = TRAINERS[job.task](
        job, model=job.model, processing_class=tokenizer, callbacks=[Recorder(window)],
        **trainer_arguments(job),
    )  # fmt: skip
    start_equal(trainer.model, job)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    args = trainer.args
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    assert pairs == job.batch
    if job.settings.get("precompute_ref_log_probs"):
        assert trainer.reference_seconds is not None, "no reference pass was observed"
    return window.result(reference_seconds=trainer.reference_seconds)


if __name__ == "__main__":
    work(measure)
