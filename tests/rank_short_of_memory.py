"""A `dpo-run` whose second rank has room for 60 tokens at once: a rank of test_elastic.py."""

from __future__ import annotations

from typing import Any

import torch

from dpo_cli.cli import main
from dpo_cli.distributed import launch
from dpo_cli.stages import sft

MOST = 60
real = sft.sft_loss


def short(model: Any, batch: Any, reduction: str) -> Any:
    out = real(model, batch, reduction)  # it fails late, when the others have gone on
    if launch.rank() == 1 and batch.input_ids.numel() > MOST:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return out


if __name__ == "__main__":
    sft.sft_loss = short
    main()
