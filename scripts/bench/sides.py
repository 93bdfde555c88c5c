"""The sides of each task, and the candidate settings of the peer (TRL or transformers).

A setting of the peer has a name of words joined with `-`, such as `cached-4-regional`: one of
STARTS, then any of CHANGES and a number of micro-batches. Settings that change the work are left
out: those that regroup pairs into other batches (grouping by length, packing) or compute in another
precision than the requested one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

Settings = dict[str, Any]
UNITS = {"dpo": "pairs", "sft": "examples", "reward": "pairs", "decode": "tokens"}
# hf: transformers' generate, as TRL uses it
PEER = {"dpo": "trl", "sft": "trl", "reward": "trl", "decode": "hf"}
STANDARD = ("default", "best", "best-live")  # of the other side; others are candidates


@dataclass(frozen=True)
class Side:
    """A worker script and its settings. name: `ours...`, or `<peer>-` and one of STANDARD or a
    candidate's name."""

    name: str
    worker: str
    settings: Settings


OURS = Side("ours", "ours", {})
NO_CHECKPOINTING = {"gradient_checkpointing": False}
STARTS: dict[str, dict[str, tuple[Settings, str]]] = {
    "dpo": {
        "cached": (NO_CHECKPOINTING | {"precompute_ref_log_probs": True}, "reference beforehand"),
        "live": (NO_CHECKPOINTING, "reference in every step"),
    },
    "sft": {
        "padded": (NO_CHECKPOINTING, "padded batches"),
        "free": (NO_CHECKPOINTING | {"padding_free": True, "max_length": None}, "padding-free"),
    },
    "reward": {"padded": (NO_CHECKPOINTING, "padded batches; TRL's reward trainer has no others")},
    "decode": {
        "dynamic": ({}, "the default cache"),
        "static": ({"cache_implementation": "static"}, "a cache of fixed size"),
    },
}
CHANGES: dict[str, tuple[Settings, str]] = {
    "ckpt": ({"gradient_checkpointing": True}, "gradient checkpointing, TRL's default"),
    "compiled": ({"torch_compile": True}, "torch.compile of the whole model: minutes of startup"),
    "regional": ({"torch_compile": True, "regional": True}, "torch.compile of each block"),
    "liger": ({"use_liger_kernel": True}, "Liger's norm, rotary and MLP kernels; not for gpt2"),
    "kernels": ({"use_kernels": True}, "layers of the Hub's kernels, which must be in its cache"),
    "flash": ({"attn_implementation": "flash_attention_2"}, "flash-attn"),
    "eager": ({"attn_implementation": "eager"}, "attention without SDPA"),
    "pad64": ({"pad_to_multiple_of": 64}, "lengths padded to a multiple of 64"),
    "loaders": ({"dataloader_num_workers": 2}, "two processes that load batches"),
    "sharded": ({"fsdp": True, "fsdp_config": {"version": 2}}, "FSDP2 instead of data parallel"),
    "half": ({"dtype": "bfloat16"}, "weights in bf16; adapters have frozen ones so anyway"),
}
PARTS = "a number: the batch in so many micro-batches"
NEEDS = {"flash": "flash_attn", "liger": "liger_kernel", "kernels": "kernels"}  # word -> package

# What `--search` tries.
TRIED = {
    "dpo": ("cached", "cached-eager", "cached-pad64", "cached-loaders", "cached-ckpt"),
    "sft": ("padded", "padded-eager", "padded-loaders", "free", "free-eager"),
    "reward": ("padded", "padded-eager", "padded-pad64", "padded-loaders"),
    "decode": ("dynamic", "dynamic-eager", "static"),
}
TRIED_ON_CUDA = {  # TRL's head is fused and chunked in all of them
    "dpo": ("cached-2", "cached-4", "cached-8", "cached-regional", "cached-4-regional",
            "cached-8-regional", "cached-4-compiled", "cached-liger", "cached-4-liger",
            "cached-4-liger-regional", "cached-flash", "cached-4-flash", "cached-4-flash-regional",
            "cached-ckpt-regional", "cached-ckpt-liger"),
    "sft": ("padded-compiled", "padded-regional", "padded-liger", "free-flash"),
    "reward": ("padded-compiled", "padded-regional", "padded-liger", "padded-flash"),
    "decode": (),
}  # fmt: skip
TRIED_ON_DEVICES = ("sharded", "4-sharded", "ckpt-sharded")
BEST = {  # the fastest in searches on a CPU in bf16; `bench.py --search` looks again
    "dpo": "cached",
    "sft": "free",
    "reward": "padded",
    "decode": "dynamic",
}
BEST_OF = {  # (task, preset), where another was
    ("dpo", "tiny4x256"): "cached-ckpt",
    ("reward", "tiny4x256"): "padded-eager",
}


def settings_of(task: str, name: str) -> Settings:
    """Settings of a candidate; exits with a list of the candidates for an unknown name."""
    start, *words = name.split("-")
    numbers = [word for word in words if word.isdigit() and int(word) > 0]
    known = start in STARTS[task] and set(words) <= CHANGES.keys() | set(numbers)
    if not known or len(numbers) > 1:
        raise SystemExit(f"--candidate {name}: is none of --task {task}\n{listing(task)}")
    parts = {"gradient_accumulation_steps": int(numbers[0])} if numbers else {}
    changes = [CHANGES[word][0] for word in words if word not in numbers]
    return {k: v for one in (STARTS[task][start][0], *changes, parts) for k, v in one.items()}


def parts_of(name: str) -> int:
    return next((int(word) for word in name.split("-") if word.isdigit()), 1)


def listing(task: str) -> str:
    """The words of candidates' names and their meaning."""
    starts = [(word, what) for word, (_, what) in STARTS[task].items()]
    words = [(word, what) for word, (_, what) in CHANGES.items()]
    rows = [("first:", ""), *starts, ("then, joined with -:", ""), ("2, 4, ...", PARTS), *words]
    names = " ".join((*TRIED[task], *TRIED_ON_CUDA[task]))
    return "\n".join([*(f"  {word:12} {what}".rstrip() for word, what in rows), f"such as {names}"])


def candidates(
    task: str, device: str, precision: str, lora: str = "none", devices: int = 1, batch: int = 0
) -> dict[str, Settings]:
    """Name -> settings tried by `--search`: those that can run here."""
    names = [*TRIED[task]]
    if task == "decode" and precision == "bf16":
        names.append("dynamic-half")
    if device == "cuda":
        names += TRIED_ON_CUDA[task]
        if devices > 1:
            names += [f"{names[0]}-{words}" for words in TRIED_ON_DEVICES]
    usable = [name for name in names if runs_here(name, precision)]
    fitting = [name for name in usable if batch % (parts_of(name) * devices) == 0]
    return named(task, fitting, precision, lora)


def runs_here(name: str, precision: str) -> bool:
    words = name.split("-")
    return all(find_spec(NEEDS[word]) for word in words if word in NEEDS) and (
        precision == "bf16" or "flash" not in words
    )


def named(task: str, names: Iterable[str], precision: str, lora: str) -> dict[str, Settings]:
    """Name -> settings. Under an adapter the frozen weights are in bf16 in bf16 runs, as on our
    side."""
    half = CHANGES["half"][0] if lora != "none" and precision == "bf16" else {}
    return {name: settings_of(task, name) | half for name in names}


def sides_of(task: str, best: Settings) -> list[Side]:
    """Sides in the order in which a round measures them. best: settings of the peer."""
    if task == "decode":
        return [
            Side("ours", "decode", {"side": "ours"}),
            Side("hf-default", "decode", {"side": "hf"}),
            Side("hf-best", "decode", {"side": "hf"} | best),
        ]
    default, fast = Side("trl-default", "trl", {}), Side("trl-best", "trl", best)
    if task != "dpo":
        return [OURS, default, fast]
    live = {key: value for key, value in best.items() if not key.startswith("precompute")}
    return [
        OURS,
        replace(OURS, name="ours-live", settings={"stage.reference_logprobs": "live"}),
        default,
        fast,
        replace(fast, name="trl-best-live", settings=live),
    ]


def select(sides: list[Side], words: str | None) -> list[Side]:
    """Select sides by name; `trl`: all of the other side, `both` or None: all."""
    names = (words or "both").split(",")
    known = {side.name for side in sides} | {"trl", "both"}
    if unknown := set(names) - known:
        raise SystemExit(f"--sides: no {', '.join(sorted(unknown))}; there are "
                         f"{', '.join(s.name for s in sides)}, trl, both")  # fmt: skip
    return [s for s in sides if s.name in names or "both" in names
            or ("trl" in names and s.name.startswith("trl-"))]  # fmt: skip


def with_candidates(task: str, words: str | None, candidates: dict[str, Settings]) -> list[Side]:
    """Our side, or the selected sides, followed by every candidate of TRL."""
    tried = [replace(best_side(task, settings), name=f"{PEER[task]}-{name}")
             for name, settings in candidates.items()]  # fmt: skip
    others = [side for side in sides_of(task, {}) if not side.name.startswith(f"{PEER[task]}-best")]
    named = set((words or "both").replace("both", "ours").split(","))
    remaining = named - {"trl", *(side.name for side in tried)}
    return [*(select(others, ",".join(remaining)) if remaining else []), *tried]


def variant(side: Side, words: Sequence[str]) -> Side:
    """dpo-run's side with additional settings, which are part of its name."""
    settings = dict(word.split("=", 1) for word in words)
    settings_text = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
    return replace(side, name=f"ours-{settings_text}", settings=side.settings | settings)


def best_side(task: str, settings: Settings) -> Side:
    return next(side for side in sides_of(task, settings) if side.name == f"{PEER[task]}-best")
