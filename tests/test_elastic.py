"""Real launches of two ranks: by the plain command, by torchrun; signals, errors, Slurm's names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from dpo_cli import cli
from dpo_cli.config import HardwareConfig
from dpo_cli.distributed import launch
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.run import run as start
from dpo_cli.workflow import sweep
from small_runs import TINY, configure, metrics, train

DPO_RUN = [sys.executable, "-m", "dpo_cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SFT = (*TINY, "stage=sft", "data.rows=64", "train.sample_prompts=0", "logger.progress=plain")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DPO_RUN_LAUNCHED")


def run(command: Sequence[str], *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *words], cwd=cwd, capture_output=True, text=True, timeout=100, check=False
    )


def errors(told: str) -> list[str]:
    return [line for line in told.splitlines() if line.startswith("error:")]


@pytest.mark.slow
def test_a_signal_stops_all_ranks_after_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = (*SFT, "hardware.devices=2", "train.max_steps=400", "train.save_every_steps=0",
             "train.eval_every_steps=0", f"run_dir={folder}")  # fmt: skip
    started = subprocess.Popen([*DPO_RUN, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 4:
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    told = started.communicate(timeout=60)[1]
    assert started.returncode == 75, told
    (line,) = errors(told)
    stopped = int(line.split("after step ")[1].split()[0])
    assert line.startswith(f"error: stopped by SIGTERM after step {stopped} of 400, state saved")
    saved = folder / "checkpoints" / f"step-{stopped}"
    assert (saved / "shards").is_dir()
    assert json.loads((saved / "MANIFEST.json").read_text())["world_size"] == 2


def test_the_error_of_all_ranks_is_told_once(tmp_path: Path) -> None:
    words = (*SFT, "hardware.devices=2", "train.max_steps=5", "optim.lr=1e20", "run_dir=run")
    done = run(DPO_RUN, *words, cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    (line,) = errors(done.stderr)
    assert "is nan" in line
    assert "optim.lr" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_with_the_stacks_of_all(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "scripts" / "faults" / "rank.py"
    words = ("launch", "hang", *SFT, "hardware.devices=2", "train.max_steps=5", "run_dir=run",
             "hardware.timeout_seconds=4", "train.eval_every_steps=0")  # fmt: skip
    done = run([sys.executable, str(script)], *words, cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    (line,) = errors(done.stderr)
    assert line.startswith(
        "error: rank 0 timed out after 4 s in a collective (hardware.timeout_seconds)"
    )
    before, _, after = done.stderr.partition("stacks of rank 1")
    assert "stacks of rank 0" in before
    assert "_train_step" in before.partition("rank 0 timed out here")[2]
    assert "in never_answers" in after  # where the one that hangs is


@pytest.mark.slow
def test_torchrun_evaluates_as_one_process_does(tmp_path: Path) -> None:
    """Also: the folder's name, which each rank would make up for itself, is one."""
    words = ("stage=evaluate", *TINY[:7], "reward_fn=length", "stage.prompts=6",
             "stage.completions=3", "stage.batch_size=6", "stage.max_new_tokens=8", "hardware=cpu",
             "logger.report=false", "stage.reference={base}", "model.path={base}")  # fmt: skip
    base = tmp_path / "base"
    train(base, *SFT[len(TINY) :], "train.max_steps=1", "logger.progress=off")
    words = tuple(word.format(base=base) for word in words if not word.startswith("model.arch"))
    words = tuple(word for word in words if not word.startswith("train."))
    start(configure(*words, f"run_dir={tmp_path / 'one'}"), ["dpo-run"])
    two = run([*TORCHRUN, "-m", "dpo_cli"], *words, cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    found, truth = (json.loads((f / "points.jsonl").read_text())
                    for f in (folder, tmp_path / "one"))  # fmt: skip
    assert found == pytest.approx(truth, abs=1e-6)
    samples = [(f / "samples.jsonl").read_text() for f in (folder, tmp_path / "one")]
    assert samples[0] == samples[1]
    assert len(samples[0].splitlines()) == 18


def test_a_killed_rank_is_told_in_a_line_and_a_killed_launcher_takes_its_ranks(
    tmp_path: Path,
) -> None:
    for victim in ("rank", "launcher"):
        folder = tmp_path / victim
        words = (*SFT, "hardware.devices=2", "train.max_steps=4000", "train.eval_every_steps=0",
                 f"run_dir={folder}")  # fmt: skip
        started = subprocess.Popen(
            [*DPO_RUN, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 4:
            assert started.poll() is None, started.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks = subprocess.run(
            ["pgrep", "-P", str(started.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        assert len(ranks) == 2
        os.kill(int(ranks[1]) if victim == "rank" else started.pid, signal.SIGKILL)
        if victim == "rank":
            told = started.communicate(timeout=60)[1]
            assert started.returncode == 128 + 9
            (line,) = errors(told)
            assert "was killed by SIGKILL; if a checkpoint was saved" in line
            assert "Traceback" not in told
        else:
            started.wait()
        while any(Path(f"/proc/{rank}").exists() for rank in ranks):
            assert time.monotonic() < deadline + 60
            time.sleep(0.1)
    assert len(list((tmp_path / "launcher" / "checkpoints").iterdir())) == 1  # saved, as told


def test_torchrun_starts_one_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = run([*TORCHRUN, "-m", "dpo_cli"], "recipe=quickstart", cwd=tmp_path)
    assert two.returncode == 1  # torchrun's own
    assert errors(two.stderr) == [
        "error: torchrun: starts one run, not a recipe; use dpo-run hardware.devices="
    ]


@pytest.mark.slow
def test_ranks_out_of_memory_go_on_with_smaller_rows(
    tmp_path: Path, alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And end where a process with enough memory does."""
    alone.setattr(os, "environ", os.environ.copy())
    alone.setattr(
        launch, "rank_command", lambda: [str(Path(__file__).with_name("rank_short_of_memory.py"))]
    )
    words = (*SFT, "train.max_steps=6", "train.micro_batch_tokens=100", "data.eval_rows=0",
             "train.save_every_steps=2", f"cache_dir={tmp_path}")  # fmt: skip
    config = configure(*words, "hardware.devices=2", f"run_dir={tmp_path / 'two'}")
    assert (
        launch.launch_ranks(config, [*words, "hardware.devices=2", f"run_dir={tmp_path / 'two'}"])
        == 0
    )
    told = capsys.readouterr().err
    assert "out of memory with 100 tokens per row: lowered to 50" in told
    train(tmp_path / "one", *words)
    ours, truth = (
        {r["step"]: r["loss"] for r in metrics(tmp_path / n) if "loss" in r} for n in ("two", "one")
    )
    assert ours == pytest.approx(truth, abs=1e-5)
    assert len(ours) == 6


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_rank_knows_itself(alone: pytest.MonkeyPatch) -> None:
    assert launch.rank() is None
    alone.setenv("WORLD_SIZE", "1")  # some machines set it for every process
    alone.setenv("RANK", "0")
    assert launch.rank() is None
    alone.setenv("WORLD_SIZE", "2")
    assert launch.rank() == 0


def test_ranks_end_with_the_code_of_the_first(alone: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    alone.setattr(launch, "_store", lambda: store)
    alone.setattr(os, "environ", {**os.environ, "HF_TOKEN": "secret"})
    launch.broadcast_config(None, 3, {"SET_BY_HYDRA": "1"})
    assert b"secret" not in store.get(launch.CONFIG)
    assert launch.receive_config() == (None, 3)
    assert os.environ["SET_BY_HYDRA"] == "1"


def test_what_is_wanted(tmp_path: Path) -> None:
    words = (*TINY, f"run_dir={tmp_path}")
    assert not launch.is_distributed(configure(*words, "stage=sft"))
    assert launch.is_distributed(configure(*words, "stage=sft", "hardware.devices=2"))
    assert not launch.is_distributed(configure(*words, "stage=inspect", "hardware.devices=2"))


def test_nodes_of_slurm_meet_at_the_first(tmp_path: Path, alone: pytest.MonkeyPatch) -> None:
    names = tmp_path / "scontrol"
    names.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"\n')
    names.chmod(0o755)
    alone.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hardware = HardwareConfig(devices=8, nodes=2)
    with pytest.raises(
        ConfigError, match=r"hardware.nodes=2 needs a Slurm job.*start on each node: torchrun"
    ):
        launch.rendezvous(hardware)
    alone.setenv("SLURM_JOB_ID", "40017")
    alone.setenv("SLURM_JOB_NODELIST", "n[3-4]")
    assert launch.rendezvous(hardware) == {
        "rdzv_endpoint": "n3:20017", "run_id": "dpo-run-40017"
    }  # fmt: skip


def test_a_later_node_of_slurm_starts_ranks_and_keeps_no_books(
    tmp_path: Path, alone: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    alone.setattr(sweep, "run_child", lambda words: started.append(list(words)) or (0, False))
    alone.setenv("SLURM_PROCID", "1")
    alone.chdir(tmp_path)
    cli.main(["-m", "stage=sft", "hardware.nodes=2", "seed=1,2", "hydra.sweep.dir=s"])
    assert [words[-1] for words in started] == [f"run_dir={tmp_path}/s/{n}" for n in (0, 1)]
    assert not list((tmp_path / "s" / "jobs").iterdir())


def test_nodes_leave_the_folder_to_the_first_rank(
    tmp_path: Path, alone: pytest.MonkeyPatch
) -> None:
    launched: list[list[str]] = []
    alone.setattr(launch, "launch_ranks", lambda config, words: launched.append(words) or 0)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "by-the-first-rank").touch()
    words = ["stage=sft", "hardware.nodes=2", f"run_dir={tmp_path / 'used'}"]
    cli.main(words)
    assert launched == [words]
    with pytest.raises(SystemExit):
        cli.main([words[0], "hardware.devices=2", words[2]])


def test_the_first_error_is_told_but_a_stop_before_all(
    tmp_path: Path, alone: pytest.MonkeyPatch
) -> None:
    assert launch.recorded_error(tmp_path) is None
    for number, error in enumerate([DataError("late"), DataError("first"), DataError("last")]):
        path = tmp_path / str(number) / "error.json"
        path.parent.mkdir()
        alone.setenv(launch.ERROR_FILE, str(path))
        launch.record_error(error)
        os.utime(path, (10 - 5 * (number == 1), 10 - 5 * (number == 1)))
    found = launch.recorded_error(tmp_path)
    assert (str(found), found.exit_code) == ("first", 3)
    path = tmp_path / "3" / "error.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"message": {"message": "saved", "errorCode": 75}}))
    assert str(launch.recorded_error(tmp_path)) == "saved"
    (tmp_path / "4").mkdir()  # what torch itself writes of an exception
    (tmp_path / "4" / "error.json").write_text('{"message": {"message": "ValueError"}}')
    assert str(launch.recorded_error(tmp_path)) == "saved"


def test_ranks_share_the_cores(alone: pytest.MonkeyPatch) -> None:
    alone.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    alone.delenv("OMP_NUM_THREADS", raising=False)
    alone.setattr(os, "environ", dict(os.environ))
    launch.limit_threads(HardwareConfig(devices=4))
    assert os.environ["OMP_NUM_THREADS"] == "4"
    launch.limit_threads(HardwareConfig(devices=2))  # someone has said
    assert os.environ["OMP_NUM_THREADS"] == "4"
