"""Runs of many processes, one a device, by torch's elastic launcher.

`hardware.devices=8` starts the launcher from the plain command; `torchrun ... -m dpo_cli ...`
is the launcher itself. Either way the first rank composes the configuration and claims the
run folder, and tells the others: what each composed for itself could differ.
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
from dpo_cli.errors import ConfigError, PeerLost, Preempted, UserError

CONFIG = "dpo_run_config"  # the key under which the first rank leaves the configuration
COMPOSE_SECONDS = 300.0
SAVE_SECONDS = 600  # from a signal to the end: a step and a checkpoint
GOES_ON = "; where checkpoints were saved, resume=<run folder> goes on"
FOLLOWED = (PeerLost.exit_code, -signal.SIGTERM)  # how ranks end because another one did
LAUNCHED = "DPO_RUN_LAUNCHED"
PR_SET_PDEATHSIG = 1  # sys/prctl.h
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where the launcher looks for a rank's last words


def rank() -> int | None:
    """This process's number among those of a run, None in a run of one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        return int(os.environ["RANK"])
    return None


def wanted(config: RunConfig) -> bool:
    """Whether the run takes more than one process; stages that compute little take one."""
    hardware = config.hardware
    return hardware.devices * hardware.nodes > 1 and spec_of(config.stage).parallel


def on_several_nodes(config: RunConfig) -> bool:
    """Whether others like this process start ranks of the same run on their nodes."""
    return wanted(config) and config.hardware.nodes > 1 and not config.dry_run


def helps_another_node() -> bool:
    """Whether this task of a Slurm job only starts ranks: one that is the first keeps the books."""
    return int(os.environ.get("SLURM_PROCID", "0")) > 0


def worker() -> list[str]:
    """What the launcher's Python runs as a rank; tests put a faulty one in its place."""
    return ["-m", "dpo_cli"]


def launch(config: RunConfig, words: Sequence[str]) -> int:
    """Start the ranks of this node, `dpo-run <words>` each, and wait for their end.

    Ranks that run out of memory start again where they were, with smaller rows. Raises the
    UserError of the rank that failed first.
    """
    hardware = config.hardware
    share_cores(hardware)
    os.environ[LAUNCHED] = "1"
    while (error := _once(hardware, words)) is not None:
        if error.run_dir is None or hardware.nodes > 1:
            raise error
        print(error, file=sys.stderr)
        # What was added to a resumed run counts on; a first command is in the run's folder.
        added = [word for word in words if not word.startswith("resume=")] \
            if any(word.startswith("resume=") for word in words) else []  # fmt: skip
        words = [f"resume={error.run_dir}", *added]
    return 0


def _once(hardware: HardwareConfig, words: Sequence[str]) -> Failed | None:
    """One start: how it failed, if it did."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _hush()
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVE_SECONDS)  # its own 30 s are no save
    with tempfile.TemporaryDirectory(prefix="dpo-run-ranks-") as logs:
        settings = LaunchConfig(
            min_nodes=hardware.nodes, max_nodes=hardware.nodes,
            nproc_per_node=hardware.devices, max_restarts=0, monitor_interval=0.1,
            rdzv_backend="c10d", **meeting_point(hardware),
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        )  # fmt: skip
        try:
            elastic_launch(settings, sys.executable)(*worker(), *words)
        except ChildFailedError as error:
            return last_words(Path(logs)) or _failure(error.failures)
        except SignalException as error:
            said = last_words(Path(logs))
            if said is not None and said.run_dir is None:
                return said
            return Failed(f"stopped by {error.sigval.name}{GOES_ON}", 128 + error.sigval)
        return None


def _hush() -> None:
    """Silence torch's launcher, which has a logger a module: we say what happened in a line."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _failure(failures: Mapping[int, Any]) -> Failed:
    """Of ranks that left no word: not one of those that only lost another."""
    number, first = min(
        failures.items(), key=lambda item: (item[1].exitcode in FOLLOWED, item[1].timestamp)
    )
    if first.exitcode < 0:
        told = f"rank {number} was killed by {first.signal_name()}"
        return Failed(f"{told}{GOES_ON}", 128 - first.exitcode)
    return Failed(f"rank {number} ended with exit code {first.exitcode}{GOES_ON}", first.exitcode)


class Failed(UserError):
    """How ranks ended. run_dir: where they can start again, having run out of memory."""

    def __init__(self, message: str, code: int, run_dir: str | None = None) -> None:
        super().__init__(message)
        self.exit_code, self.run_dir = code, run_dir


def meeting_point(hardware: HardwareConfig) -> dict[str, Any]:
    """Where the nodes find each other: here, or on the first node of a Slurm job."""
    if hardware.nodes == 1:
        return {"rdzv_endpoint": "localhost:0", "run_id": uuid.uuid4().hex}
    job, listed = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
    if not (job and listed):
        raise ConfigError(
            f"hardware.nodes={hardware.nodes}: on each node start torchrun --nnodes="
            f"{hardware.nodes} --nproc-per-node={hardware.devices} --rdzv-backend=c10d "
            "--rdzv-endpoint=<first node>:29500 -m dpo_cli <the same words>; a Slurm job does "
            "so by itself"
        )
    command = ["scontrol", "show", "hostnames", listed]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    port = 20_000 + int(job) % 20_000
    return {"rdzv_endpoint": f"{names[0]}:{port}", "run_id": f"dpo-run-{job}"}


def share_cores(hardware: HardwareConfig) -> None:
    """CPU threads of a rank, unless someone has said: all of them at once would starve."""
    if hardware.threads is None and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ["OMP_NUM_THREADS"] = str(max(1, (cores or 1) // hardware.devices))


def end_with_the_launcher() -> None:
    """Linux tells this rank when the launcher dies, however; else it would train on alone."""
    if launched_by_us() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def lead(
    config: RunConfig | None, code: int = 0, environment: Mapping[str, str] | None = None
) -> None:
    """The first rank's part: tell the others the configuration, or an exit code without one.

    environment: what the configuration sets, not what is there: secrets and a node's own stay.
    """
    store = _store()
    store.set(CONFIG, pickle.dumps((config, code, dict(environment or {}))))
    if config is not None:
        _join(store, config)


def follow() -> tuple[RunConfig | None, int]:
    """Another rank's part: the configuration, or the exit code with which all of them end."""
    store = _store()
    store.wait([CONFIG], timedelta(seconds=COMPOSE_SECONDS))
    config, code, environment = pickle.loads(store.get(CONFIG))  # from our own first rank
    os.environ.update(environment)
    if config is not None:
        _join(store, config)
    return config, code


def abandon(code: int) -> None:
    """The first rank's part, having failed: ranks that still wait for a configuration end."""
    import torch.distributed as dist

    if not dist.is_initialized():
        lead(None, code)


def launched_by_us() -> bool:
    """Whether a dpo-run started the ranks and will say how they ended."""
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
    of_gpus = "gloo" if share_gpus() else "nccl"
    dist.init_process_group(
        f"cpu:gloo,cuda:{of_gpus}" if cuda else "gloo",
        store=dist.PrefixStore("dpo_run", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=config.hardware.timeout_seconds),
    )


@contextmanager
def together(config: RunConfig) -> Iterator[None]:
    """Around a rank's work: HangError where others do not answer. Then all leave together."""
    import torch.distributed as dist

    from dpo_cli.distributed import hangs, ranks

    ranks.start_patient_group()
    peers = hangs.meet(config.hardware.timeout_seconds)
    with hangs.explained(peers):
        yield
        dist.destroy_process_group()


def as_started(config: RunConfig) -> RunConfig:
    """Devices and nodes as the launcher has started them; ConfigError where that is refused."""
    size = int(os.environ["WORLD_SIZE"])
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    hardware = config.hardware
    if not spec_of(config.stage).parallel:
        raise ConfigError(f"stage={config.stage.name}: takes one process; start it by dpo-run")
    hardware.devices, hardware.nodes = devices, max(1, size // devices)
    return config


def record(error: UserError) -> None:
    """Leave an error where the launcher finds it: several ranks may raise the same one."""
    path = os.environ.get(ERROR_FILE)
    if path:
        facts = {"timestamp": str(int(time.time())), "py_callstack": str(error)}
        message: dict[str, Any] = {"message": str(error), "errorCode": error.exit_code}
        message |= {"extraInfo": facts, "run_dir": getattr(error, "run_dir", None)}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def last_words(logs: Path) -> Failed | None:
    """What the ranks recorded: the oldest, or the one of a run that was stopped and saved."""
    found = []
    for path in logs.rglob("error.json"):
        body = json.loads(path.read_text(encoding="utf-8")).get("message")
        if isinstance(body, dict) and "errorCode" in body:
            order = body["errorCode"] != Preempted.exit_code, path.stat().st_mtime_ns
            found.append((order, body))
    if not found:
        return None
    _, first = min(found, key=lambda entry: entry[0])
    return Failed(str(first["message"]), int(first["errorCode"]), first.get("run_dir"))
