"""Cases of untrusted folders, which must neither run code nor hang a command: it ends in one line
with exit code 2."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.faults.lab import OVER, SFT, Lab, check

MODULES = ("yaml", "json", "torch", "hydra", "resource")
SECONDS = 60  # limit of a failed start, which takes two on an idle machine
LOOP = "(.*)*(.*)*(.*)*(.*)*(.*)*z"
CONFIGS: dict[str, Any] = {
    "hidden size -4": {"n_embd": -4},
    "no heads": {"n_head": 0},
    "a width in words": {"n_embd": "big"},
    "10^7 layers": {"n_layer": 10**7},
    "no context": {"n_positions": None},
    "a kernel of the hub": {"attn_implementation": "kernels-community/flash-attn"},
    "quantization": {"quantization_config": {"quant_method": "bitsandbytes"}},
    "other weights": {"transformers_weights": "adapter_model.bin"},
    "a list": [1],
}
ADAPTERS: dict[str, Any] = {
    "an expression that does not terminate": {"target_modules": LOOP},
    "ranks by one": {"rank_pattern": {LOOP: 2}},
    "numbers for names": {"target_modules": [1, 2]},
    "rank 10^9": {"r": 10**9},
    "a library to import": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
}
NEST = "{% for i in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
TEMPLATES = {
    "loops": NEST,
    "include": "{% include '/etc/passwd' %}",
    "10^10^9": "{{ 10 ** 10 ** 9 }}",
    "10^13 letters": "{{ 'a' * 10 ** 13 }}",
}


def current_folder(lab: Lab) -> str:
    """Case B11: modules with the names of libraries in the folder where a sweep and ranks start."""
    modules = [lab.folder / f"{name}.py" for name in MODULES]
    ran = lab.fresh("ran")
    try:
        for path in modules:
            path.write_text(f"open({str(ran)!r}, 'w'); raise SystemExit(99)\n")
        program = ("-P", "-m", "dpo_cli")  # as in the installed command
        words = (*SFT, "train.max_steps=1", "seed=0,1", f"hydra.sweep.dir={lab.fresh('sweep')}")
        lab.wait(lab.python(*program, "-m", *words)).must(0, "sweep")
        words = (*SFT, "train.max_steps=1", "hardware.devices=2", f"run_dir={lab.fresh('two')}")
        lab.wait(lab.python(*program, *words)).must(0, "ranks")
        check(not ran.exists(), "code of the current folder ran")
    finally:
        for path in modules:
            path.unlink(missing_ok=True)
    return f"a sweep of 2 jobs and a run of 2 ranks next to {len(modules)} such modules: none ran"


def model_folder(lab: Lab) -> str:
    """Case B12: config.json, and an index of weights that names files elsewhere."""
    words = [*OVER, "stage=sft", "train.max_steps=1"]
    for name, changes in CONFIGS.items():
        folder = _changed(lab, "config.json", changes)
        _refused(lab, name, [*words, f"model.path={folder}"])
    for name in ("pytorch_model.bin", "../elsewhere.safetensors", "link.safetensors"):
        folder = lab.copy(lab.base() / "final", "hostile")
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "link.safetensors").symlink_to(lab.base() / "final" / "model.safetensors")
        _write(folder / "model.safetensors.index.json", {"weight_map": {"a": name}})
        _refused(lab, f"an index with {name}", [*words, f"model.path={folder}"])
    return f"{len(CONFIGS) + 3} folders: exit 2 in one line"


def adapter_folder(lab: Lab) -> str:
    """Case B13: adapter_config.json, merged and trained on."""
    words = (*OVER, "stage=sft", "lora=lora", "train.max_steps=1", f"model.path={lab.base()}")
    trained = lab.uninterrupted("adapter", *words) / "final"
    for name, changes in ADAPTERS.items():
        folder = _changed(lab, "adapter_config.json", changes, trained)
        _refused(lab, name, ["stage=export", "model=custom", f"model.path={folder}"])
    return f"{len(ADAPTERS)} adapters: exit 2 in one line"


def chat_template(lab: Lab) -> str:
    """Case B14, in a dry run."""
    talk = {"prompt": [{"role": "user", "content": "hi"}]} | {
        name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")
    }
    rows = lab.folder / "chat.jsonl"
    rows.write_text(f"{json.dumps(talk)}\n" * 4)
    words = ["stage=sft", "data=jsonl", f"data.path={rows}", "model=custom", "hardware=cpu",
             "dry_run=true"]  # fmt: skip
    for name, template in TEMPLATES.items():
        folder = lab.copy(lab.base() / "final", "hostile")
        (folder / "chat_template.jinja").write_text(template)
        _refused(lab, name, [*words, f"model.path={folder}"])
    return f"{len(TEMPLATES)} templates: exit 2 in one line"


def _changed(lab: Lab, file: str, changes: Any, source: Path | None = None) -> Path:
    """A copy of a model's folder with changed values in one file."""
    folder = lab.copy(source or lab.base() / "final", "hostile")
    path = folder / file
    original = json.loads(path.read_text())
    _write(path, {**original, **changes} if isinstance(changes, Mapping) else changes)
    return folder


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _refused(lab: Lab, name: str, words: list[str]) -> None:
    start = time.monotonic()
    run = [] if "dry_run=true" in words else [f"run_dir={lab.fresh('refused')}"]
    done = lab.forked(*words, *run, code=2, what=name)
    lines = [line for line in done.output.splitlines() if line.strip()]
    check(len(lines) == 1 and lines[0].startswith("error: "), f"{name}: printed {lines[:3]}")
    check(time.monotonic() - start < SECONDS, f"{name}: took {time.monotonic() - start:.0f} s")
