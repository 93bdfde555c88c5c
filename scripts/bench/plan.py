"""The input of a measurement, weights and rows (`Plan`), and its work (`Job`)."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scripts.bench.job import Job
from scripts.bench.launch import PLAIN, Launch, run_worker
from scripts.bench.shapes import CHANGEABLE, KNOWN, Shape, resized
from scripts.common import ROOT, versions

OF_ROWS = ("folder", "pairs", "length", "lengths", "prompt_length", "r")  # in their files' names
CODE = ("dpo_cli/**/*.py", "conf/**/*.yaml", "scripts/bench/**/*.py")


@dataclass(frozen=True)
class Plan:
    """What to create in `folder`; an existing model is reused.

    data: a file of real pairs, read by `adapter`; None: synthetic pairs of `prompt_length` and
    `response_length` tokens (including EOS) or, if None, with lengths drawn as in the dataset
    `lengths`. context: positions of the model. length: maximum tokens of prompt and response.
    reward_model: a sequence classifier with one label instead of a language model. r: rank of an
    initial adapter, created next to the model. device: that random weights are sampled on.
    """

    folder: str
    shape: Shape
    context: int
    pairs: int
    length: int
    seed: int
    data: str | None = None
    adapter: str = "jsonl"
    tokenizer: str | None = None
    prompt_length: int | None = None
    response_length: int | None = None
    reward_model: bool = False
    r: int | None = None
    device: str = "cpu"
    lengths: str = "hh"

    @property
    def model(self) -> Path:
        return Path(self.folder) / "model"

    @property
    def ids(self) -> Path:
        return Path(self.folder) / f"ids-{self.shape_of_rows}.jsonl"

    @property
    def rows(self) -> Path:
        return Path(self.folder) / f"rows-{self.shape_of_rows}.jsonl"

    @property
    def shape_of_rows(self) -> str:
        return f"{self.lengths}-{self.pairs}x{self.prompt_length}-{self.length}"

    @property
    def adapter_start(self) -> Path:
        return Path(self.folder) / f"adapter-r{self.r}"

    def data_overrides(self, path: str) -> list[str]:
        """How `dpo-run` reads the pairs: in the file's order, none held out."""
        return [
            f"data={self.adapter}", f"data.path={path}", "data.eval_rows=0",
            "data.eval_split=null", f"data.max_length={self.length}",
            f"data.max_prompt_length={max(1, self.length // 2)}",
        ]  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Plan:
        values = json.loads(path.read_text())
        return cls(**values | {"shape": Shape(**values["shape"])})

    def is_ready(self) -> bool:
        return self.ids.is_file() and (self.r is None or self.adapter_start.is_dir())

    def prepare(self, threads: int, launch: Launch = PLAIN) -> None:
        """Create model and rows unless they exist."""
        if self.is_ready():
            return
        path = Path(self.folder) / "plan.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))
        scratch = Path(self.folder) / f"make-{self.ids.stem}"
        shutil.rmtree(scratch, ignore_errors=True)
        run_worker("prepare", [path], scratch, threads, launch)

    def label(self) -> str:
        """A description of the rows."""
        if self.data is not None:
            by = f", {Path(self.tokenizer).name} tokenizer" if self.tokenizer else ""
            return f"{Path(self.data).name} ({self.adapter}{by}, at most {self.length} tokens)"
        name = KNOWN[self.lengths].name
        kind = f"lengths drawn as in {name}"
        if self.prompt_length is not None or self.response_length is not None:
            prompt, response = (f"{name}'s" if n is None else f"{n}-token"
                                for n in (self.prompt_length, self.response_length))  # fmt: skip
            kind = f"{prompt} prompts, {response} responses"
        return f"synthetic pairs, {kind}, at most {self.length} tokens"

    def sha256(self) -> str | None:
        """sha256 of the file of real pairs."""
        if self.data is None:
            return None
        with Path(self.data).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def shape_of(args: argparse.Namespace) -> tuple[str, Shape]:
    """The name and shape of the preset, with the sizes that the arguments change."""
    return resized(args.preset, {key: getattr(args, key) for key in CHANGEABLE})


def make_plan(args: argparse.Namespace, shape: Shape, folder: Path) -> Plan:
    """Rows for exactly one epoch, and a model with a long enough context."""
    length = args.length
    if args.prompt_length and args.response_length:
        length = args.prompt_length + args.response_length
    generated = args.new_tokens if args.task == "decode" else 0
    plan = Plan(
        folder="", shape=shape, context=max(shape.context, length + generated),
        pairs=(args.warmup + args.steps) * args.batch, length=length, seed=args.seed,
        data=args.data, adapter=args.adapter, tokenizer=args.tokenizer,
        prompt_length=args.prompt_length, response_length=args.response_length,
        reward_model=args.task == "reward", r=None if args.lora == "none" else args.r,
        device=args.device, lengths=args.lengths_of,
    )  # fmt: skip
    facts = {key: value for key, value in asdict(plan).items() if key not in OF_ROWS}
    return replace(plan, folder=str(folder.absolute() / f"made-{digest(json.dumps(facts))}"))


def make_job(args: argparse.Namespace, plan: Plan) -> Job:
    return Job(
        task=args.task, model=str(plan.model), ids=str(plan.ids),
        overrides=plan.data_overrides(str(plan.rows)), batch=args.batch, warmup=args.warmup,
        steps=args.steps, lr=args.lr, precision=args.precision, device=args.device,
        threads=max(1, args.threads // args.devices), length=plan.length, samples=args.samples,
        new_tokens=args.new_tokens, lora=args.lora, r=args.r, devices=args.devices,
        adapter="" if args.lora == "none" else str(plan.adapter_start),
    )  # fmt: skip


def results_folder(folder: Path, job: Job) -> Path:
    """Folder of a job's results: one per version of code and packages."""
    paths = sorted(path for pattern in CODE for path in ROOT.glob(pattern))
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return folder.absolute() / f"measured-{digest(json.dumps([job.text(), code, versions()]))}"


def work_of_ours(folder: Path) -> dict[str, Any]:
    """A result of one of our sides in this folder, of any command; {} if there is none."""
    for path in sorted(folder.glob("*-ours*/result.json")):
        result: dict[str, Any] = json.loads(path.read_text())
        if result.get("flops"):
            return result
    return {}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
