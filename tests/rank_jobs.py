"""What the ranks of a test run, started by torch's launcher: `rank_jobs.py <file of jobs>`.

A job is {name, run_dir, overrides}. Each rank leaves which examples it has trained on, step by
step, in `<run_dir>/examples-<rank>.json`.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dpo_cli.run import run
from dpo_cli.session import rows
from small_runs import TINY, configure


def main(path: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for job in json.loads(Path(path).read_text()):
        folder = Path(job["run_dir"])
        trained: list[list[int]] = []
        real = rows.pack_share

        def recorded(*args: Any, real: Any = real, trained: Any = trained) -> Any:
            made = real(*args)
            trained.append([i for b in made if not b.filler for i in b.example_ids.tolist()])
            return made

        rows.pack_share = recorded
        words = [*TINY, f"run_dir={folder}", f"hardware.devices={dist.get_world_size()}"]
        run(configure(*words, *job["overrides"]), ["dpo-run"])
        rows.pack_share = real
        (folder / f"examples-{dist.get_rank()}.json").write_text(json.dumps(trained))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
