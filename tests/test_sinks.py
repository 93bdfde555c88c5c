"""Metric sinks: what is written, and what remains of it after a resume."""

import json
import resource
import sys
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from types import ModuleType, SimpleNamespace

import pytest

from dpo_cli.config import LoggerConfig
from dpo_cli.errors import ConfigError, DiskError
from dpo_cli.report.sinks import SINKS, JsonlSink, open_sinks

JSONL_ONLY = LoggerConfig(tensorboard=False)


def write(run_dir, resume_step, rows, logger=JSONL_ONLY):
    sinks = open_sinks(logger, run_dir, resume_step, {})
    for step, values in rows:
        for sink in sinks:
            sink.write(step, values)
    for sink in sinks:
        sink.close()


def read_rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_sink_but_jsonl_has_a_switch():
    switches = {field.name for field in fields(LoggerConfig) if field.type == "bool"}
    assert set(SINKS) == switches - {"plots", "report"} | {"jsonl"}  # those are drawn at the end


def test_jsonl_rows_are_strict_json_and_on_disk_at_once(tmp_path):
    (sink,) = open_sinks(JSONL_ONLY, tmp_path / "new", 0, {})
    sink.write(3, {"loss": 0.1 + 0.2, "grad_norm": float("nan"), "lr": float("inf")})

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "new" / "metrics.jsonl").read_text()  # before close
    row = json.loads(text, parse_constant=refuse)
    assert datetime.fromisoformat(row.pop("time")).tzinfo is not None
    assert row == {"step": 3, "loss": 0.1 + 0.2, "grad_norm": None, "lr": None}
    sink.close()


def test_resume_removes_the_rows_of_lost_work(tmp_path):
    write(tmp_path, 0, [(0, {"eval/loss": 9}), *((s, {"loss": s}) for s in (1, 2, 3, 4))])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')  # killed here
    (tmp_path / "samples.jsonl").write_text('{"step": 2}\n{"step": 4}\n')
    write(tmp_path, 2, [(3, {"loss": 30})])
    rows = [(row["step"], row.get("loss")) for row in read_rows(tmp_path)]
    assert rows == [(0, None), (1, 1), (2, 2), (3, 30)]
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 2}\n'


def test_a_run_that_starts_over_keeps_no_row(tmp_path):
    write(tmp_path, 0, [(0, {"eval/loss": 9}), (1, {"loss": 1})])
    write(tmp_path, 0, [(0, {"eval/loss": 8})])
    assert [(row["step"], row["eval/loss"]) for row in read_rows(tmp_path)] == [(0, 8)]


def test_tensorboard_shows_each_step_once_after_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = LoggerConfig(tensorboard=True)
    write(tmp_path, 0, [(s, {"loss": s, "eval/loss": -s}) for s in (0, 1, 2, 3, 4)], logger)
    write(tmp_path, 2, [(s, {"loss": 10 * s}) for s in (3, 4)], logger)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (0, 0), (1, 1), (2, 2), (3, 30), (4, 40),
    ]  # fmt: skip
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(0, 0), (1, -1), (2, -2)]

    write(tmp_path, 0, [(0, {"loss": 7})], logger)  # started over
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 7)]


@pytest.mark.parametrize(
    ("module", "switch"), [("wandb", "wandb"), ("torch.utils.tensorboard", "tensorboard")]
)
def test_a_missing_package_names_switch_and_remedy(tmp_path, monkeypatch, module, switch):
    monkeypatch.setitem(sys.modules, module, None)  # import raises ImportError
    logger = LoggerConfig(**{"tensorboard": False, switch: True})
    with pytest.raises(ConfigError, match=rf"pip install .*logger\.{switch}=false"):
        open_sinks(logger, tmp_path, 0, {})


class FakeWandb(ModuleType):
    """The calls of wandb>=0.21 that the sink makes, recorded."""

    Error = type("Error", (Exception,), {})
    Settings = SimpleNamespace

    def __init__(self, failure=None):
        super().__init__("wandb")
        self.failure, self.started, self.logged, self.axes, self.finished = failure, [], [], [], 0

    def init(self, **options):
        if self.failure:
            raise self.Error(self.failure)
        self.started.append(options)
        return self

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_goes_on_in_the_same_run_without_secrets(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    logger = LoggerConfig(tensorboard=False, wandb=True, wandb_project="mine")
    config = {"stage": {"beta": 0.1, "note": "0123456789abcdef"}}
    for resume_step in (0, 5):
        *_, sink = open_sinks(logger, tmp_path / "run-1", resume_step, config)
        sink.write(resume_step + 1, {"loss": 0.5})
        sink.close()
    first, second = fake.started
    assert first["id"] == second["id"] == (tmp_path / "run-1/wandb_run_id.txt").read_text().strip()
    assert (first["project"], first["name"], first["resume"]) == ("mine", "run-1", "allow")
    assert first["config"] == {"stage": {"beta": 0.1, "note": "[redacted]"}}
    assert first["settings"].x_disable_meta  # else the raw command line is uploaded
    assert ("*", "step") in fake.axes
    assert fake.logged == [{"loss": 0.5, "step": 1}, {"loss": 0.5, "step": 6}]
    assert fake.finished == 2


@pytest.mark.parametrize(
    ("key", "variable", "project"),
    [("mine", "theirs", "mine"), (None, "theirs", "theirs"), (None, None, "dpo-run")],
)
def test_wandbs_project_may_be_in_the_environment(tmp_path, monkeypatch, key, variable, project):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_PROJECT", variable)
    logger = LoggerConfig(tensorboard=False, wandb=True, wandb_project=key)
    open_sinks(logger, tmp_path, 0, {})
    assert fake.started[0]["project"] == project


def test_wandb_that_cannot_start_is_one_line_and_closes_the_rest(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("api_key not configured"))
    closed = []
    monkeypatch.setattr(JsonlSink, "close", lambda _sink: closed.append("jsonl"))
    with pytest.raises(ConfigError, match=r"api_key not configured.*WANDB_MODE=offline"):
        open_sinks(LoggerConfig(tensorboard=False, wandb=True), tmp_path, 0, {})
    assert closed == ["jsonl"]


@contextmanager
def file_size_limit(bytes_):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_is_a_disk_error(tmp_path):
    (sink,) = open_sinks(JSONL_ONLY, tmp_path, 0, {})
    sink.write(1, {"loss": 1.0})
    good = (tmp_path / "metrics.jsonl").read_bytes()
    with file_size_limit(len(good) + 10), pytest.raises(DiskError, match=r"metrics\.jsonl"):
        sink.write(2, {"loss": 2.0})
    sink.close()  # with space again, what was held back is written
    write(tmp_path, 1, [])
    assert (tmp_path / "metrics.jsonl").read_bytes() == good
