"""dpo-run with a failing rank: `python scripts/faults/rank.py launch <raise|hang> <words>`.

The launcher of dpo-run starts this file as each rank; rank 1 raises or hangs in its third step.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from dpo_cli.cli import main
from dpo_cli.distributed import launch

HOW = "DPO_RUN_FAULT"


def inject() -> None:
    from dpo_cli.train import loop

    real = loop._train_step

    def train_step(run: Any) -> dict[str, float]:
        if run.step == 2 and launch.rank() == 1:
            print(f"fault at {time.time():.3f}", file=sys.stderr, flush=True)
            if os.environ[HOW] == "raise":
                raise ValueError("injected into rank 1")
            never_answers()
        return real(run)

    loop._train_step = train_step


def never_answers() -> None:
    while True:
        time.sleep(1)


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        os.environ[HOW] = sys.argv[2]
        launch.rank_command = lambda: [__file__]
        main(sys.argv[3:])
    else:
        inject()
        main()
