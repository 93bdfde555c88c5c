"""Detect the device in a separate process, so that this one never initializes CUDA."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from scripts.common import cpu_model

PROGRAM = """
import json, torch
facts = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
if facts["device"] == "cuda":
    p = torch.cuda.get_device_properties(0)
    facts |= {"name": p.name, "memory_gb": round(p.total_memory / 2**30, 1),
              "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
              "cuda": torch.version.cuda}
print(json.dumps(facts))
"""


def inspect_machine(requested: str) -> dict[str, Any]:
    """{device: cuda or cpu, and the known properties of the machine}"""
    host = {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "system": system()}
    if requested == "cpu":
        return {"device": "cpu", **host}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        return {"device": "cpu", "why": (done.stderr.strip().splitlines() or ["?"])[-1], **host}
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**facts, **driver(), **host} if facts["device"] == "cuda" else {**facts, **host}


def driver() -> dict[str, str]:
    """From nvidia-smi, if available."""
    names = ("driver_version", "power.limit", "clocks.max.sm")
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().splitlines()[0].split(",")
    return {n.replace(".", "_"): v.strip() for n, v in zip(names, values, strict=False)}


def system() -> str:
    return f"{platform.system()} {platform.release().partition('-')[0]}"


def slug(machine: Mapping[str, Any], device: str) -> str:
    """`gpu-check-nvidia-h100-80gb-hbm3`"""
    name = machine["name"] if device == "cuda" else "cpu"
    return "gpu-check-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
