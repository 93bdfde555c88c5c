"""Who is measured in each task, and which settings of the other side are tried.

Left out are settings that change the work: those that regroup the pairs into other batches
(grouping by length, packing) or compute in another precision than the one asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

Settings = dict[str, Any]
UNITS = {"dpo": "pairs", "sft": "examples", "decode": "tokens"}
PEER = {"dpo": "trl", "sft": "trl", "decode": "hf"}  # hf: transformers' generate, as TRL uses it


@dataclass(frozen=True)
class Side:
    """A worker script and its settings. name: `ours...` or `<peer>-default`, `<peer>-best`."""

    name: str
    worker: str
    settings: Settings


NO_CHECKPOINTING = {"gradient_checkpointing": False}
CACHED = NO_CHECKPOINTING | {"precompute_ref_log_probs": True}
PADDING_FREE = NO_CHECKPOINTING | {"padding_free": True, "max_length": None}

CANDIDATES: dict[str, dict[str, Settings]] = {
    "dpo": {
        "cached reference, no checkpointing": CACHED,
        "... eager attention": CACHED | {"attn_implementation": "eager"},
        "... batches padded to 64": CACHED | {"pad_to_multiple_of": 64},
        "... 2 loader processes": CACHED | {"dataloader_num_workers": 2},
        "cached reference, checkpointing": {"precompute_ref_log_probs": True},
    },
    "sft": {
        "no checkpointing": NO_CHECKPOINTING,
        "... eager attention": NO_CHECKPOINTING | {"attn_implementation": "eager"},
        "... 2 loader processes": NO_CHECKPOINTING | {"dataloader_num_workers": 2},
        "... padding-free": PADDING_FREE,
        "... padding-free, eager attention": PADDING_FREE | {"attn_implementation": "eager"},
    },
    "decode": {
        "defaults": {},
        "eager attention": {"attn_implementation": "eager"},
        "static cache": {"cache_implementation": "static"},
    },
}
CUDA_CANDIDATES: dict[str, dict[str, Settings]] = {
    "dpo": {"... torch.compile": CACHED | {"torch_compile": True}},
    "sft": {"... torch.compile": NO_CHECKPOINTING | {"torch_compile": True}},
    "decode": {},
}
FLASH = {"attn_implementation": "flash_attention_2"}
BEST = {  # the fastest of the candidates so far; `bench.py --search` looks again
    "dpo": "cached reference, no checkpointing",
    "sft": "... padding-free",
    "decode": "defaults",
}


def candidates(task: str, device: str, precision: str) -> dict[str, Settings]:
    """Name -> settings, those that can run here."""
    found = dict(CANDIDATES[task])
    if task == "decode" and precision == "bf16":
        found["weights in bf16"] = {"dtype": "bfloat16"}
    if device == "cuda":
        found |= CUDA_CANDIDATES[task]
        if find_spec("flash_attn") and precision == "bf16":
            found |= {f"{k}, FlashAttention 2": v | FLASH for k, v in CANDIDATES[task].items()
                      if "attn_implementation" not in v}  # fmt: skip
    return found


def sides_of(task: str, best: Settings) -> list[Side]:
    """In the order in which a round measures them. `best`: settings of the other side."""
    if task == "decode":
        return [
            Side("ours", "bench_decode.py", {"side": "ours"}),
            Side("hf-default", "bench_decode.py", {"side": "hf"}),
            Side("hf-best", "bench_decode.py", {"side": "hf"} | best),
        ]
    ours = Side("ours", "bench_ours.py", {})
    default, fast = Side("trl-default", "bench_trl.py", {}), Side("trl-best", "bench_trl.py", best)
    if task == "sft":
        return [ours, default, fast]
    live = {key: value for key, value in best.items() if not key.startswith("precompute")}
    return [
        ours,
        replace(ours, name="ours-live", settings={"stage.reference_logprobs": "live"}),
        default,
        fast,
        replace(fast, name="trl-best-live", settings=live),
    ]


def candidate_side(task: str, name: str, settings: Settings) -> Side:
    """A side of `--search`."""
    return replace(sides_of(task, settings)[-1 if task != "dpo" else 3], name=name)
