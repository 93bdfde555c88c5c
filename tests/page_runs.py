"""Run folders as runs leave them, written by hand: what tests of the report read."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from dpo_cli.report.page import write_run_report
from dpo_cli.report.page_recipe import write_recipe_report

VOID = {"meta", "img", "br", "link", "input", "source"}

HOSTILE = (
    "<script>alert(1)</script> {{7*7}} {% raw %} \"double\" 'single' &amp; \x1b[31mred "
    "\u202eevil\u202c nul\x00 </style></p><img src=x onerror=alert(1)>"
)


class Page(HTMLParser):
    """The elements of a page, and the text inside each kind."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_bytes().decode("utf-8")  # strictly
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(self.source)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return self.texts["body"][0]

    def rows(self, caption: str) -> list[list[str]]:
        """Cells of the table with that caption, its head first."""
        (table,) = [t for t in self.source.split("<table")[1:] if f"<caption><span>{caption}<" in t]
        parser = _Rows()
        parser.feed("<table" + table.split("</table>")[0])
        return parser.rows


class _Rows(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self._cell = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")


def png(width: int = 300, height: int = 150) -> bytes:
    image = io.BytesIO()
    Figure(figsize=(width / 150, height / 150), dpi=150).savefig(image, format="png")
    return image.getvalue()


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def run_folder(
    folder: Path,
    config: dict[str, Any],
    summary: dict[str, Any],
    samples: list[Any] | None = None,
    pictures: tuple[str, ...] = (),
    **files: str,
) -> Path:
    """files: `points_jsonl="..."` writes points.jsonl."""
    (folder / "plots").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "command.txt").write_text(f"dpo-run stage={config['stage']['name']}\n")
    (folder / "versions.json").write_text('{"torch": "2.13.0"}')
    (folder / "samples.jsonl").write_text(jsonl(samples or []))
    for name in pictures:
        (folder / "plots" / f"{name}.png").write_bytes(png())
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(content)
    return folder


def dpo_run(folder: Path, **changes: Any) -> Path:
    """A finished DPO run on pairs of another run."""
    config = {
        "stage": {"name": "dpo", "loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
        "model": {"name": "custom", "path": "runs/sft/final", "hub_id": None},
        "data": {"name": "jsonl", "path": "runs/03-label/train.jsonl", "hub_id": None},
    }
    summary = {
        "stage": "dpo", "run_dir": str(folder),
        "first/eval/loss": 0.693147, "eval/loss": 0.61234,
        "first/eval/rewards/accuracies": 0.5, "eval/rewards/accuracies": 0.7306,
        "first/loss": 0.693147, "loss": 0.5, "lr": 1e-6,
    }  # fmt: skip
    samples = [
        {"step": step, "prompt": prompt, "completion": f" {prompt} at {step}"}
        for step in (0, 10, 20, 30, 40)
        for prompt in ("The film", "I saw")
    ]
    values = {"config": config, "summary": summary, "samples": samples, **changes}
    pictures = ("overview", "loss")
    return run_folder(folder, pictures=pictures, metrics_jsonl=jsonl([{"step": 40}]), **values)


def evaluation(folder: Path, reward: float, **changes: Any) -> Path:
    """A finished evaluation of one policy."""
    config = {
        "stage": {"name": "evaluate"},
        "model": {"name": "tiny", "path": "runs/04-dpo", "hub_id": None},
        "data": {"name": "sentiment", "path": None, "hub_id": None},
    }
    summary = {
        "stage": "evaluate", "run_dir": str(folder), "reward": reward, "reward_se": 0.0152,
        "kl": 1.819, "kl_se": 0.0782, "accuracy": 0.7306, "accuracy_se": 0.01822,
        "tokens": 25.09, "pairs": 594,
    }  # fmt: skip
    samples = [
        {"prompt": f"Prompt {n}", "completion": f" answer {n}", "reward": n / 100}
        for n in range(50)
    ]
    return run_folder(
        folder, **{"config": config, "summary": summary, "samples": samples, **changes}
    )


POINTS = [
    {"method": "dpo", "setting": "beta=0.1", "step": 40, "seed": 0, "policy": "runs/a",
     "kl": 5.2, "kl_se": 0.1, "reward": 0.93, "reward_se": 0.01, "optimum_reward_at_kl": 0.95,
     "shortfall": 0.02},
    {"method": "dpo", "setting": "beta=1", "step": 40, "seed": 0, "policy": "runs/b",
     "kl": 1.0, "kl_se": 0.1, "reward": 0.7, "reward_se": 0.01, "optimum_reward_at_kl": 0.8,
     "shortfall": 0.1},
    {"method": "optimum", "setting": "beta=0.01", "step": None, "seed": 0, "policy": "runs/ref",
     "kl": 9.0, "kl_se": 0.1, "reward": 0.99, "reward_se": 0.01},
]  # fmt: skip


def outcome(folder: Path, **changes: Any) -> dict[str, Any]:
    """A step's line of a recipe's facts."""
    name = folder.name
    return {
        "name": name.partition("-")[2], "step": name, "label": name, "title": name,
        "folder": str(folder), "action": "run", "seconds": 90.0, "total_seconds": 90.0, **changes,
    }  # fmt: skip


def report(folder: Path, **data: Any) -> Page:
    return Page(write_run_report(folder, data))


def recipe_report(folder: Path, folders: list[Path], **changes: Any) -> Page:
    facts = {
        "recipe": "small", "description": "Two steps.", "vars": {"beta": 0.1}, "repeat": {},
        "run_dir": str(folder), "steps": [outcome(step) for step in folders],
        "report": [{"label": "SFT", "folders": [str(folders[0])]},
                   {"label": "DPO", "folders": [str(folders[1])]}],
    }  # fmt: skip
    return Page(write_recipe_report(folder, {**facts, **changes}))
