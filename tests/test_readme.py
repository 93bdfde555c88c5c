"""Every command of the README runs, on small local stand-ins for the hub's models and rows."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dpo_cli.config.hydra import composed
from dpo_cli.config.read import prepare
from small_runs import TINY, train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("dpo-run")]
TABLE = [c for c in re.findall(r"`(dpo-run[^`]*)`", README) if "<" not in c and c != "dpo-run"]
QUICK = ("train.max_steps=1", "train.batch_size=4", "train.sample_prompts=0", "logger=none")
RECIPE = ("vars.batch_size=8", "vars.eval_rows=2", "vars.max_length=64")
HUB = ("model.path=my-model", "data.path=hh.jsonl", "data.max_length=64",
       "data.max_prompt_length=32", "data.eval_rows=2")  # fmt: skip

SMALL = {
    "reward": ["stage.normalize_prompts=2", "stage.normalize_max_new_tokens=4"],
    "ppo-baseline": ["stage.rollout_samples=4", "stage.ppo_epochs=1", "stage.max_new_tokens=4",
                     "stage.normalize_prompts=2"],
    "online-dpo": ["stage.completions=2", "stage.max_new_tokens=4"],
    "evaluate": ["stage.prompts=2", "stage.max_new_tokens=4"],
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with what the README's reader is supposed to have."""
    folder = tmp_path_factory.mktemp("readme")
    sft = folder / "runs" / "my-sft"
    train(sft, "stage=sft", "train.max_steps=1")
    for stage, words in (("reward", ("stage.normalize_prompts=0",)), ("dpo", ())):
        own = (f"stage={stage}", f"model.path={sft}", "train.max_steps=1", *words)
        train(folder / "runs" / f"my-{stage}", *own)
    (folder / "my-model").symlink_to(folder / "runs" / "my-sft" / "final")
    said = [(f"Question {i}?", " A good answer.", f" Bad answer {i}.") for i in range(220)]
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in said]
    turns = [f"\n\nHuman: {p}\n\nAssistant:" for p, _, _ in said]
    hh = [
        {"chosen": turn + c, "rejected": turn + r}
        for turn, (_, c, r) in zip(turns, said, strict=True)
    ]
    rated = [{"prompt": p, "response": c, "good": i % 2 == 0} for i, (p, c, _) in enumerate(said)]
    for name, content in (("pairs.jsonl", rows), ("hh.jsonl", hh), ("rated.jsonl", rated)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "config.yaml").write_text("base_model: my-model\nrl: dpo\nlearning_rate: 1e-6\n")
    return folder


def stand_ins(words: list[str]) -> list[str]:
    """The README's words, then what makes them small and local."""
    if names := [w.removeprefix("recipe=") for w in words if w.startswith("recipe=")]:
        small = RECIPE if names == ["preferences"] else ()
        return [*words, *small, f"run_dir=recipe-{names[0]}"]
    if words[0] in ("convert", "help", "runs"):
        return words
    extra = [w for w in HUB if not any(v.startswith(w.split("=")[0] + "=") for v in words)]
    local = extra if "data=hh" in words else []
    if "stage=inspect" in words or "--cfg" in words or "--help" in words:
        return [*words, *local]
    if "-m" in words:
        local = [w for w in TINY if not w.startswith("logger")]
    for stage, small in SMALL.items():
        local += small if f"stage={stage}" in words else []
    return [*words, *local, *(() if "stage=evaluate" in words else QUICK)]


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 5
    assert len(TABLE) >= 3


@pytest.mark.parametrize("command", [*COMMANDS, *TABLE])
def test_command(cli, workplace, command):
    words = stand_ins(shlex.split(command)[1:])
    done = cli(*words, cwd=workplace)
    assert done.returncode == 0, done.stderr[-2000:]


def test_learning_rates_of_the_training_commands(tmp_path, monkeypatch):
    """The stage's own rates: model=tiny's scale is for random weights."""
    monkeypatch.chdir(tmp_path)
    for name in ("my-model", "runs/my-sft"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pairs.jsonl").touch()
    rates = {}
    for command in [c for c in COMMANDS if "stage=sft" in c or "stage=dpo" in c]:
        words = shlex.split(command)[1:]
        rates[command] = prepare(composed(words), words).optim.lr
    assert len(rates) >= 3
    for command, rate in rates.items():
        assert rate == (1e-5 if "stage=sft" in command else 1e-6), command


def test_make_targets_exist():
    named = set(re.findall(r"^make (\w+)$", README, re.MULTILINE))
    assert "demo" in named
    for target in named:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_the_map_names_every_module():
    package = ROOT / "dpo_cli"
    names = [p.name + "/" if p.is_dir() else p.name for p in package.iterdir()]
    table = README[README.index("| part of `dpo_cli/` |") :]
    patterns = [
        re.compile(re.escape(name).replace(r"\*", ".*")) for name in re.findall(r"`([^`]+)`", table)
    ]
    for name in names:
        if name.startswith("_"):
            continue
        assert any(p.fullmatch(name) for p in patterns), f"the README's map lacks {name}"


def test_each_line_of_security_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    rows = re.findall(r"^\| (?!input|---)(.*) \|$", text, re.MULTILINE)
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(\w+)(?:::(test_\w+))?`", row.rpartition(" | ")[2])
        assert named, row
        for module, test in named:
            source = (ROOT / "tests" / f"test_{module}.py").read_text()
            assert not test or f"def {test}(" in source, row
