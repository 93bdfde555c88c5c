"""Launch one process per device with torch's elastic launcher.

`hardware.devices=8` starts the launcher from the plain command; `torchrun ... -m dpo_cli ...`
works as well. Either way rank 0 composes the configuration, claims the run folder and broadcasts
both: if each rank composed its own, they could differ.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from dpo_cli.config import HardwareConfig, RunConfig, spec_of
from dpo_cli.distributed.signals import stopping_signals
from dpo_cli.durable.redact import unkept
from dpo_cli.errors import ConfigError, PeerLost, Preempted, UserError
from dpo_cli.escapes import say

CONFIG = "dpo_run_config"  # key in the store under which rank 0 publishes the configuration
COMPOSE_SECONDS = 300.0
SAVE_SECONDS = 600  # grace period after a signal: one step and one checkpoint
RESUME_HINT = "; if a checkpoint was saved, continue with resume=<run folder>"
# Exit codes of ranks that ended because another one did.
SECONDARY_EXITS = (PeerLost.exit_code, -signal.SIGTERM)
LAUNCHED = "DPO_RUN_LAUNCHED"
PR_SET_PDEATHSIG = 1  # sys/prctl.h
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # environment variable: the file for a rank's error


def rank() -> int | None:
    """This process's rank; None in a single-process run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        return int(os.environ["RANK"])
    return None


def is_distributed(config: RunConfig) -> bool:
    """Whether the run uses more than one process; stages that are not parallel use one."""
    hardware = config.hardware
    return hardware.devices * hardware.nodes > 1 and spec_of(config.stage).parallel


def on_several_nodes(config: RunConfig) -> bool:
    """Whether a launcher like this one runs on every node of the job."""
    return is_distributed(config) and config.hardware.nodes > 1 and not config.dry_run


def is_secondary_node() -> bool:
    """Whether this Slurm task only starts ranks; task 0 also writes the records."""
    return int(os.environ.get("SLURM_PROCID", "0")) > 0


def rank_command() -> list[str]:
    """Arguments to Python that start a rank, with -P to import no module from the current folder;
    tests replace it with a faulty rank."""
    return ["-P", "-m", "dpo_cli"]


def launch_ranks(config: RunConfig, overrides: Sequence[str]) -> int:
    """Start this node's ranks, each with `dpo-run <overrides>`, and wait for them.

    Ranks that run out of memory are restarted from the last checkpoint with a smaller token
    budget. Raises the UserError of the rank that failed first.
    """
    hardware = config.hardware
    limit_threads(hardware)
    os.environ[LAUNCHED] = "1"
    while (error := _run_ranks(hardware, overrides)) is not None:
        if error.run_dir is None or hardware.nodes > 1:
            raise error
        say(str(error), error=True)
        # A resumed run keeps the overrides added to it; the first command's are in its folder.
        resumed = any(override.startswith("resume=") for override in overrides)
        rest = [o for o in overrides if not o.startswith("resume=")]
        added = rest if resumed else unkept(rest)
        overrides = [f"resume={error.run_dir}", *added]
    return 0


def _run_ranks(hardware: HardwareConfig, overrides: Sequence[str]) -> Failed | None:
    """Start the ranks once; returns how they failed, if they did."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_launcher()
    # The default of 30 s is too short to save a checkpoint.
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVE_SECONDS)
    with tempfile.TemporaryDirectory(prefix="dpo-run-ranks-") as logs:
        settings = LaunchConfig(
            min_nodes=hardware.nodes, max_nodes=hardware.nodes,
            nproc_per_node=hardware.devices, max_restarts=0, monitor_interval=0.1,
            rdzv_backend="c10d", **rendezvous(hardware),
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle=",".join(n.name for n in (*stopping_signals(), signal.SIGQUIT)),
        )  # fmt: skip
        try:
            elastic_launch(settings, sys.executable)(*rank_command(), *overrides)
        except ChildFailedError as error:
            return recorded_error(Path(logs)) or _failure(error.failures)
        except SignalException as error:
            recorded = recorded_error(Path(logs))
            if recorded is not None and recorded.run_dir is None:
                return recorded
            return Failed(f"stopped by {error.sigval.name}{RESUME_HINT}", 128 + error.sigval)
        return None


def _silence_launcher() -> None:
    """Silence the launcher's loggers (one per module): we report the outcome in one line."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _failure(failures: Mapping[int, Any]) -> Failed:
    """The failure of ranks that recorded no error, preferring one that is not secondary."""
    number, first = min(
        failures.items(), key=lambda item: (item[1].exitcode in SECONDARY_EXITS, item[1].timestamp)
    )
    if first.exitcode < 0:
        killed = f"rank {number} was killed by {first.signal_name()}"
        return Failed(f"{killed}{RESUME_HINT}", 128 - first.exitcode)
    return Failed(
        f"rank {number} ended with exit code {first.exitcode}{RESUME_HINT}", first.exitcode
    )


class Failed(UserError):
    """How the ranks failed. run_dir: the run to restart, if they ran out of memory."""

    def __init__(self, message: str, code: int, run_dir: str | None = None) -> None:
        super().__init__(message)
        self.exit_code, self.run_dir = code, run_dir


def rendezvous(hardware: HardwareConfig) -> dict[str, Any]:
    """Rendezvous settings: this host, or the first node of a Slurm job. Raises ConfigError."""
    if hardware.nodes == 1:
        return {"rdzv_endpoint": "localhost:0", "run_id": uuid.uuid4().hex}
    job, listed = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
    if not (job and listed):
        raise ConfigError(
            f"hardware.nodes={hardware.nodes} needs a Slurm job; without one, start on each node: "
            f"torchrun --nnodes={hardware.nodes} --nproc-per-node={hardware.devices} "
            "--rdzv-backend=c10d --rdzv-endpoint=<first node>:29500 -m dpo_cli <same overrides>"
        )
    command = ["scontrol", "show", "hostnames", listed]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    port = 20_000 + int(job) % 20_000
    return {"rdzv_endpoint": f"{names[0]}:{port}", "run_id": f"dpo-run-{job}"}


def limit_threads(hardware: HardwareConfig) -> None:
    """Divide the CPU cores among the ranks, unless the number of threads is set."""
    if hardware.threads is None and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ["OMP_NUM_THREADS"] = str(max(1, (cores or 1) // hardware.devices))


def end_with_launcher() -> None:
    """Have Linux terminate this rank when the launcher dies, even by SIGKILL."""
    if launched_by_us() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def broadcast_config(
    config: RunConfig | None, code: int = 0, environment: Mapping[str, str] | None = None
) -> None:
    """Rank 0: send the other ranks the configuration, or None and an exit code.

    environment: only the variables that the configuration sets; secrets are not sent.
    """
    store = _store()
    store.set(CONFIG, pickle.dumps((config, code, dict(environment or {}))))
    if config is not None:
        _join(store, config)


def receive_config() -> tuple[RunConfig | None, int]:
    """Other ranks: the configuration, or None and the exit code to end with."""
    store = _store()
    store.wait([CONFIG], timedelta(seconds=COMPOSE_SECONDS))
    config, code, environment = pickle.loads(store.get(CONFIG))  # trusted: from our own rank 0
    os.environ.update(environment)
    if config is not None:
        _join(store, config)
    return config, code


def release_ranks(code: int) -> None:
    """Rank 0, after a failure: end the ranks that still wait for a configuration."""
    import torch.distributed as dist

    if not dist.is_initialized():
        broadcast_config(None, code)


def launched_by_us() -> bool:
    """Whether dpo-run, not torchrun, started the ranks; it then reports how they ended."""
    return os.environ.get(LAUNCHED) == "1"


def _store() -> Any:
    import torch.distributed as dist

    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=COMPOSE_SECONDS))))
    return store


def _join(store: Any, config: RunConfig) -> None:
    import torch
    import torch.distributed as dist

    from dpo_cli.distributed.ranks import share_gpus

    cuda = torch.cuda.is_available() and config.hardware.device != "cpu"
    gpu_backend = "gloo" if share_gpus() else "nccl"
    dist.init_process_group(
        f"cpu:gloo,cuda:{gpu_backend}" if cuda else "gloo",
        store=dist.PrefixStore("dpo_run", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=config.hardware.timeout_seconds),
    )


@contextmanager
def process_group(config: RunConfig) -> Iterator[None]:
    """Around a rank's work: HangError on a timeout; destroys the process group at the end."""
    import torch.distributed as dist

    from dpo_cli.distributed import hangs, ranks

    ranks.start_slow_group()
    peers = hangs.find_peers(config.hardware.timeout_seconds)
    with hangs.as_hang_error(peers):
        yield
        dist.destroy_process_group()


def with_launched_ranks(config: RunConfig) -> RunConfig:
    """Set hardware.devices and hardware.nodes to what torchrun started. Raises ConfigError."""
    size = int(os.environ["WORLD_SIZE"])
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    hardware = config.hardware
    if not spec_of(config.stage).parallel:
        raise ConfigError(
            f"stage={config.stage.name} runs in a single process: start it with dpo-run"
        )
    hardware.devices, hardware.nodes = devices, max(1, size // devices)
    return config


def record_error(error: UserError) -> None:
    """Write an error to the launcher's error file, from which it is printed once for all ranks."""
    path = os.environ.get(ERROR_FILE)
    if path:
        facts = {"timestamp": str(int(time.time())), "py_callstack": str(error)}
        message: dict[str, Any] = {"message": str(error), "errorCode": error.exit_code}
        message |= {"extraInfo": facts, "run_dir": getattr(error, "run_dir", None)}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def recorded_error(logs: Path) -> Failed | None:
    """The oldest error that a rank recorded, or a Preempted one (stopped and saved) if any."""
    errors = []
    for path in logs.rglob("error.json"):
        body = json.loads(path.read_text(encoding="utf-8")).get("message")
        if isinstance(body, dict) and "errorCode" in body:
            order = body["errorCode"] != Preempted.exit_code, path.stat().st_mtime_ns
            errors.append((order, body))
    if not errors:
        return None
    _, first = min(errors, key=lambda entry: entry[0])
    return Failed(str(first["message"]), int(first["errorCode"]), first.get("run_dir"))
