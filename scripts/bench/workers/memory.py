"""dpo-run's estimate of a run's memory, and the peak of that run from start to end."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dpo_cli.plan.lengths import plan_facts
from dpo_cli.plan.memory.estimate import Estimate, estimate
from dpo_cli.report.console import Progress
from dpo_cli.session.session import Session
from dpo_cli.stages import load_stage
from dpo_cli.train.runtime import start_runtime
from scripts.bench.job import Job, peak_memory_mb, work, worker_versions
from scripts.bench.workers.ours import training_overrides
from scripts.common import resident_mb
from scripts.measuring import compose

NOT_TENSORS = {  # parts of the estimate that the measured peak does not include
    "cpu": ("program",),
    "cuda": ("program", "allocator"),
}


def measure(job: Job) -> dict[str, Any]:
    """Covers loading, the pass over the reference, every step, the evaluation and saving."""
    config = compose(training_overrides(job))
    stage = load_stage(config.stage.name)
    facts = plan_facts(config)
    assert facts is not None
    runtime = start_runtime(config.hardware, config.seed)
    torch.ones(64, 64, device=runtime.device).matmul(torch.ones(64, 64, device=runtime.device))
    if config.lora.name != "none":  # imports for adapters count as the program's, too
        for name in (
            "dpo_cli.model.adapters.lora",
            *(["bitsandbytes"] if config.lora.quantization else []),
        ):
            import_module(name)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True)
    before = resident_mb("VmRSS") if job.device == "cpu" else 0.0
    stage(Session(config, run_dir, runtime, Progress("off"), []))
    estimated = estimate(config, facts)
    return {
        "estimated_mb": compared(estimated, job.device) / 2**20,
        "moment": estimated.moment,
        "parts_mb": {name: size / 2**20 for name, size in estimated.parts.items()},
        # A tiny run may fit into memory that imports have freed: at least 1 MB.
        "peak_memory_mb": max(1.0, peak_memory_mb(job.device) - before),
        "device_name": torch.cuda.get_device_name() if job.device == "cuda" else None,
        "versions": worker_versions(),
        "seconds": 1.0,  # nothing is timed
        "others_cpu": 0.0,
    }


def compared(estimated: Estimate, device: str) -> float:
    return estimated.total - sum(estimated.parts[name] for name in NOT_TENSORS[device])


if __name__ == "__main__":
    work(measure)
