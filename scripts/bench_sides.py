"""Who is measured in each task, and which settings of the other side are tried.

Left out are settings that change the work: those that regroup the pairs into other batches
(grouping by length, packing) or compute in another precision than the one asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

Settings = dict[str, Any]
UNITS = {"dpo": "pairs", "sft": "examples", "reward": "pairs", "decode": "tokens"}
# hf: transformers' generate, as TRL uses it
PEER = {"dpo": "trl", "sft": "trl", "reward": "trl", "decode": "hf"}


@dataclass(frozen=True)
class Side:
    """A worker script and its settings. name: `ours...` or `<peer>-default`, `<peer>-best`."""

    name: str
    worker: str
    settings: Settings


NO_CHECKPOINTING = {"gradient_checkpointing": False}
CACHED = NO_CHECKPOINTING | {"precompute_ref_log_probs": True}
PADDING_FREE = NO_CHECKPOINTING | {"padding_free": True, "max_length": None}

EAGER = {"attn_implementation": "eager"}
FLASH = {"attn_implementation": "flash_attention_2"}
LOADERS = {"dataloader_num_workers": 2}

CANDIDATES: dict[str, dict[str, Settings]] = {
    "dpo": {
        "cached reference": CACHED,
        "cached reference, eager attention": CACHED | EAGER,
        "cached reference, padded to 64": CACHED | {"pad_to_multiple_of": 64},
        "cached reference, 2 loaders": CACHED | LOADERS,
        "cached reference, checkpointing": {"precompute_ref_log_probs": True},
    },
    "sft": {
        "padded": NO_CHECKPOINTING,
        "padded, eager attention": NO_CHECKPOINTING | EAGER,
        "padded, 2 loaders": NO_CHECKPOINTING | LOADERS,
        "padding-free": PADDING_FREE,
        "padding-free, eager attention": PADDING_FREE | EAGER,
    },
    "reward": {  # TRL's reward trainer always pads
        "padded": NO_CHECKPOINTING,
        "padded, eager attention": NO_CHECKPOINTING | EAGER,
        "padded, to a multiple of 64": NO_CHECKPOINTING | {"pad_to_multiple_of": 64},
        "padded, 2 loaders": NO_CHECKPOINTING | LOADERS,
    },
    "decode": {
        "dynamic cache": {},
        "dynamic cache, eager attention": EAGER,
        "static cache": {"cache_implementation": "static"},
    },
}
COMPILED: dict[str, dict[str, Settings]] = {  # on CUDA
    "dpo": {"cached reference, compiled": CACHED | {"torch_compile": True}},
    "sft": {"padded, compiled": NO_CHECKPOINTING | {"torch_compile": True}},
    "reward": {"padded, compiled": NO_CHECKPOINTING | {"torch_compile": True}},
    "decode": {},
}
BEST = {  # the fastest in searches on a CPU in bf16; `bench.py --search` looks again
    "dpo": "cached reference",
    "sft": "padding-free",
    "reward": "padded",
    "decode": "dynamic cache",
}
BEST_OF = {  # (task, preset), where another was
    ("dpo", "tiny4x256"): "cached reference, checkpointing",
    ("reward", "tiny4x256"): "padded, eager attention",
}


def candidates(task: str, device: str, precision: str) -> dict[str, Settings]:
    """Name -> settings, those that can run here."""
    found = dict(CANDIDATES[task])
    if task == "decode" and precision == "bf16":
        found["weights in bf16"] = {"dtype": "bfloat16"}
    if device == "cuda":
        found |= COMPILED[task]
        if find_spec("flash_attn") and precision == "bf16":
            found |= {f"{k}, flash attention": v | FLASH for k, v in CANDIDATES[task].items()
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
    if task != "dpo":
        return [ours, default, fast]
    live = {key: value for key, value in best.items() if not key.startswith("precompute")}
    return [
        ours,
        replace(ours, name="ours-live", settings={"stage.reference_logprobs": "live"}),
        default,
        fast,
        replace(fast, name="trl-best-live", settings=live),
    ]


def best_side(task: str, settings: Settings) -> Side:
    return next(side for side in sides_of(task, settings) if side.name == f"{PEER[task]}-best")
