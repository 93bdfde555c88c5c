"""Run-folder files: redaction, atomic writes, truncation, versions."""

import errno
import json
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from dpo_cli.durable.redact import redact
from dpo_cli.errors import DiskError
from dpo_cli.report import files
from dpo_cli.report.files import (
    append_samples,
    drop_rows_after,
    first_command,
    versions,
    write_redacted_json,
    write_run_files,
)
from dpo_cli.report.page_read import read_folder

HF_TOKEN = "hf_" + "aB3" * 11
SK_KEY = "sk-proj-" + "x9Y" * 8


@pytest.fixture
def environment(monkeypatch):
    """An environment of known variables only."""
    for name in list(os.environ):
        if name not in {"PATH", "HOME", "TMPDIR"}:
            monkeypatch.delenv(name)
    return monkeypatch.setenv


@pytest.mark.parametrize("name", ["MY_TOKEN", "API_KEY", "db_password", "SECRET_SAUCE"])
def test_values_of_secret_variables_are_redacted(environment, name):
    environment(name, "correct-horse")
    assert redact("a correct-horse b") == "a [redacted] b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "disabled-here"),  # no token
        ("HF_TOKEN_PATH", "/home/someone/token"),  # a place
        ("MAX_TOKENS", "4096"),  # too short to be one
        ("EDITOR", "correct-horse"),
    ],
)
def test_other_variables_are_kept(environment, name, value):
    environment(name, value)
    assert redact(f"x {value}") == f"x {value}"


def test_a_secret_within_a_secret_leaves_nothing_behind(environment):
    environment("A_TOKEN", "12345678")
    environment("B_TOKEN", "12345678-and-more")
    assert redact("12345678-and-more") == "[redacted]"


@pytest.mark.parametrize("secret", [HF_TOKEN, SK_KEY, "ghp_" + "a1" * 18, "user:password"])
def test_token_shapes_are_redacted(environment, secret):
    text = f"https://{secret}@host/x" if ":" in secret else f"key={secret}."
    assert secret not in redact(text)
    assert "[redacted]" in redact(text)


@pytest.mark.parametrize(
    "text",
    ["task-classification-of-things-1", "sk-learn", "hf_model", "a" * 40, "http://host:80/p@q"],
)
def test_ordinary_text_is_kept(environment, text):
    assert redact(text) == text


def test_redaction_reaches_nested_values_and_keys(environment):
    environment("X_TOKEN", "correct-horse")
    value = {"a": ["correct-horse", 1, None], "correct-horse": {"p": Path("/x/correct-horse")}}
    expected = {"a": ["[redacted]", 1, None], "[redacted]": {"p": "/x/[redacted]"}}
    assert redact(value) == expected


def test_run_files_describe_the_run_without_secrets(environment, tmp_path):
    environment("WANDB_API_KEY", "0123456789abcdef")
    config = {
        "stage": {"beta": 0.1, "lr": 1e-6, "loss": "sigmoid"},
        "data": {"revision": "12e8", "path": None, "name": "caf\u00e9 @ 'x': y", "on": "yes"},
        "betas": [0.9, 0.999],
        "token": f"0123456789abcdef {HF_TOKEN}",
    }
    argv = ["dpo-run", "data.path=a b.jsonl", "key=0123456789abcdef"]
    write_run_files(tmp_path / "run", config, argv)

    for path in (tmp_path / "run").iterdir():
        assert "0123456789abcdef" not in path.read_text()
        assert HF_TOKEN not in path.read_text()
    expected = config | {"token": "[redacted] [redacted]"}
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert yaml.safe_load(text) == expected
    assert OmegaConf.to_container(OmegaConf.create(text)) == expected  # "12e8" stays a text
    command = (tmp_path / "run" / "command.txt").read_text()
    assert shlex.split(command) == ["dpo-run", "data.path=a b.jsonl", "key=[redacted]"]
    assert json.loads((tmp_path / "run" / "versions.json").read_text()) == versions()


def test_each_start_adds_its_command(tmp_path):
    write_run_files(tmp_path, {}, ["dpo-run", "seed=1"])
    write_run_files(tmp_path, {}, ["dpo-run", "resume=true"])
    assert (tmp_path / "command.txt").read_text() == "dpo-run seed=1\ndpo-run resume=true\n"


SEPARATORS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # at which str.splitlines ends a line


def test_a_start_is_one_line_whatever_its_words_hold(tmp_path):
    assert len(f"a{SEPARATORS}b".splitlines()) == len(SEPARATORS) + 1
    word = f"logger.wandb_project='x{SEPARATORS}y \x00 \x1b \udcff \" z'"
    for _ in range(2):
        write_run_files(tmp_path, {}, ["dpo-run", word, "seed=1"])
    text = (tmp_path / "command.txt").read_text(encoding="utf-8")
    first, second = text.splitlines()
    assert first == second
    program, escaped, last = first_command(tmp_path)
    assert (program, last) == ("dpo-run", "seed=1")
    assert escaped.startswith("logger.wandb_project='x\\n\\r\\x0b\\x0c")
    assert len(read_folder(tmp_path).commands) == 2


def test_a_command_that_an_older_version_wrote_torn_is_still_read(tmp_path):
    (tmp_path / "command.txt").write_text("dpo-run 'x\ny'\n")
    assert first_command(tmp_path) == ["dpo-run 'x"]
    assert first_command(tmp_path / "absent") == []


def test_versions_of_earlier_starts_are_kept_and_told(tmp_path, monkeypatch):
    installed = {"python": "3.11.7", "torch": "2.12.0", "peft": "0.21.0", "git_commit": "a"}
    monkeypatch.setattr(files, "versions", lambda: dict(installed))
    assert write_run_files(tmp_path, {}, []) == ""
    assert write_run_files(tmp_path, {}, []) == ""
    for version, before in (("2.13.0", "2.12.0"), ("2.14.0", "2.13.0")):
        installed |= {"torch": version, "git_commit": version}
        told = write_run_files(tmp_path, {}, [])
        assert told.endswith(f": torch {version} (before: {before})")
    stored = json.loads((tmp_path / "versions.json").read_text())
    assert stored == installed | {
        "torch (earlier)": "2.12.0, 2.13.0", "git_commit (earlier)": "a, 2.13.0",
    }  # fmt: skip


def test_json_is_strict_and_plain(tmp_path):
    import numpy as np

    value = {"a": float("nan"), "b": [float("-inf"), np.float32(0.5)], 3: Path("x")}
    write_redacted_json(tmp_path / "x.json", value)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert read == {"a": None, "b": [None, 0.5], "3": "x"}


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_redacted_json(path, {"old": 1})

    def full(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"x\.json.*No space left"):
        write_redacted_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_lost_work_are_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    kept = '{"step": 1, "t": "\u2028 \u0085"}\n{"step": 2}\n{"step": 2, "more": 1}\n'.encode()
    lost = b'{"step": 3}\nnot json\n{"no": "step"}\n[1]\n{"step": 2, "torn": '
    path.write_bytes(kept + lost)
    assert drop_rows_after(path, 2) == 5
    assert path.read_bytes() == kept


def test_a_file_without_lost_rows_is_not_touched(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    before = path.stat()
    assert drop_rows_after(path, 2) == 0
    assert drop_rows_after(tmp_path / "absent.jsonl", 2) == 0
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_samples_come_back_as_they_were(environment, tmp_path):
    environment("X_TOKEN", "correct-horse")
    texts = ["line\nbreak", "na\u00efve \U0001f642 \u2028", "\x00\x1b[31m", "lone \udc80", "<b>"]
    append_samples(tmp_path, 1, [{"prompt": "p", "completion": text} for text in texts])
    append_samples(tmp_path, 2, [{"prompt": "my correct-horse", "completion": "c", "r": 0.5}])
    rows = (tmp_path / "samples.jsonl").read_bytes().decode().split("\n")
    assert rows.pop() == ""
    read = [json.loads(row) for row in rows]
    assert [row["completion"] for row in read[:-1]] == texts
    assert read[-1] == {"step": 2, "prompt": "my [redacted]", "completion": "c", "r": 0.5}


def test_versions_are_the_installed_ones_and_import_nothing():
    code = (
        "import json, sys; from dpo_cli.report.files import versions; v = versions();"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules);"
        "print(json.dumps([v, sorted(heavy)]))"
    )
    checkout = Path(__file__).parents[1]
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=checkout)
    found, heavy = json.loads(out)
    assert heavy == []
    assert found["torch"] == metadata.version("torch")
    assert found["python"] == ".".join(str(n) for n in sys.version_info[:3])
    assert "wandb" in found or not any(d.name == "wandb" for d in metadata.distributions())


def test_commit_of_a_checkout_only(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    assert files._git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert files._git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert files._git_commit(tmp_path) == f"{commit}-dirty"
    assert files._git_commit(tmp_path / "site-packages") is None
