"""Shared by the programs of this folder: this checkout, this machine, child processes, files."""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled",
}  # fmt: skip
PACKAGES = (
    "torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel", "flash-attn",
    "kernels", "tokenizers", "accelerate", "datasets", "hydra-core", "numpy",
)  # fmt: skip


def environment(folder: Path, threads: int) -> dict[str, str]:
    """The environment of a child: offline, caches in `folder`, this checkout first in PYTHONPATH,
    followed by our own entries."""
    return os.environ | OFFLINE | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads), "HF_HOME": str(folder / "hf"),
        "DPO_RUN_CACHE": str(folder / "cache"),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that this process can import."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """The checkout's commit, with `+` if it has changes; None without git."""
    try:
        head, status = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def shown_command(program: str, argv: Sequence[str]) -> str:
    """The command with file names instead of paths, as published results must not show folders."""
    words = []
    for word in argv:
        key, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(key + equals + (Path(value).name if os.sep in value else value))
    return f"python scripts/{program} {shlex.join(words)}".rstrip()


def write_atomic(path: Path, text: str) -> None:
    """Write atomically: a process may be stopped at any moment."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def markdown_row(cells: Sequence[Any]) -> str:
    """A line of a Markdown table, with characters that would end a cell replaced."""
    safe = (str(cell).replace("|", "/").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(safe)} |"


def resident_mb(field: str) -> float:
    """Resident memory of this process: VmRSS, now, or VmHWM, the maximum. Not ru_maxrss if
    avoidable: it is inherited from the parent across fork and exec."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
    lines = status.read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(f"{field}:")) / 1024


def synchronize(device: str) -> None:
    """Wait until the device has finished its queued work."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without an incomplete last line."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def outcomes_of(report: Path) -> dict[str, tuple[str, str]]:
    """From pytest's JUnit report: `file::Class::name[parameters]` -> (passed | failure | error |
    skipped, reason)."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        # pytest joins the file's folders, its name and the classes with dots
        parts = case.get("classname", "").split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith("test_")), 0)
        name = "::".join([f"{parts[at]}.py", *parts[at + 1 :], case.get("name", "")])
        bad = [(part.tag, part.get("message", "")) for part in case
               if part.tag in ("failure", "error", "skipped")]  # fmt: skip
        outcomes[name] = bad[0] if bad else ("passed", "")
    return outcomes
