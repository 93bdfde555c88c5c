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
ON_CUDA: dict[str, dict[str, Settings]] = {
    "dpo": {
        "cached reference, compiled": CACHED | {"torch_compile": True},
        "cached reference, 2 micro-batches": CACHED | {"gradient_accumulation_steps": 2},
        "cached reference, 4 micro-batches": CACHED | {"gradient_accumulation_steps": 4},
    },
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


LIGER = {"use_liger_kernel": True}
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2}}
HALF = {"dtype": "bfloat16"}


def candidates(
    task: str, device: str, precision: str, lora: str = "none", devices: int = 1, batch: int = 0
) -> dict[str, Settings]:
    """Name -> settings, those that can run here. Under an adapter the frozen weights are in bf16
    where the run is, as on our side."""
    found = dict(CANDIDATES[task])
    if task == "decode" and precision == "bf16":
        found["weights in bf16"] = HALF
    if device == "cuda":
        found |= on_cuda(task, precision)
        if devices > 1:
            found |= {f"{k}, sharded": v | SHARDED for k, v in CANDIDATES[task].items()}
    if lora != "none" and precision == "bf16":
        found = {name: settings | HALF for name, settings in found.items()}
    parts = {name: v.get("gradient_accumulation_steps", 1) * devices for name, v in found.items()}
    return {name: settings for name, settings in found.items() if batch % parts[name] == 0}


def on_cuda(task: str, precision: str) -> dict[str, Settings]:
    """What is tried on a GPU alone, with the packages that are installed."""
    found, plain = dict(ON_CUDA[task]), CANDIDATES[task]
    if find_spec("flash_attn") and precision == "bf16":
        found |= {f"{k}, flash attention": v | FLASH for k, v in plain.items()
                  if "attn_implementation" not in v}  # fmt: skip
        if task == "dpo":  # in the versions of TRL that have it: a candidate may fail
            found["padding-free, flash attention"] = CACHED | {"padding_free": True} | FLASH
    if find_spec("liger_kernel") and task != "decode":
        found |= {f"{k}, Liger": v | LIGER for k, v in plain.items()
                  if v.get("attn_implementation") != "eager"}  # fmt: skip
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


def select(sides: list[Side], words: str | None) -> list[Side]:
    """By name, `trl` for all of the other side, `both` or None for all."""
    wanted = (words or "both").split(",")
    known = {side.name for side in sides} | {"trl", "both"}
    if unknown := set(wanted) - known:
        raise SystemExit(f"--sides: no {', '.join(sorted(unknown))}; there are "
                         f"{', '.join(s.name for s in sides)}, trl, both")  # fmt: skip
    return [s for s in sides if s.name in wanted or "both" in wanted
            or ("trl" in wanted and s.name.startswith("trl-"))]  # fmt: skip


def best_side(task: str, settings: Settings) -> Side:
    return next(side for side in sides_of(task, settings) if side.name == f"{PEER[task]}-best")
