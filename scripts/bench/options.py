"""Command-line options of the benchmark: one table, from which each command takes some."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.bench.lora import LORA
from scripts.bench.shapes import CHANGEABLE, KNOWN, PRESETS
from scripts.bench.sides import parts_of, settings_of
from scripts.common import ROOT

DATA = """\
data: by default synthetic pairs of random words. Lengths are drawn from log-normal
distributions fitted to Anthropic HH (harmless-base/test in GPT-2's tokens: prompts of 124 on
average, median 96; chosen 42, rejected 52), so that a third of a padded batch of 4 is unique
tokens and the rest padding and repeated prompts, as there. --lengths tldr: prompts of about 350
and responses of 35, --lengths ultrafeedback: of about 180 and 350 with a long tail; both assumed.
--prompt-length and --response-length fix them. --data FILE --adapter hh takes real pairs: a
seeded sample, read as dpo-run reads it, with --tokenizer FOLDER or else a byte-level BPE trained
on the file. Nothing is downloaded."""

FLAG = {"action": "store_true"}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {  # group -> option -> arguments of argparse
    "model": {
        "preset": {"choices": PRESETS, "default": "tiny4x256"},
        **{name: {"type": int, "help": "instead of the preset's"} for name in CHANGEABLE},
        "lora": {"choices": LORA, "default": "none", "help": "on linear layers; for --task dpo"},
        "r": {"type": int, "default": 16, "help": "rank of the adapter; alpha is twice that"},
        "tokenizer": {"metavar": "FOLDER", "help": "default: see data"},
    },
    "data": {
        "data": {"metavar": "FILE", "help": "real pairs; default: synthetic ones"},
        "adapter": {"default": "jsonl", "help": "how FILE is read: hh, jsonl, ..."},
        "lengths": {"choices": KNOWN, "default": "hh", "dest": "lengths_of",
                    "help": "of synthetic pairs"},
        "length": {"type": int, "help": "maximum tokens of prompt and response: 512, or 1024 "
                                        "for the others"},
        "prompt-length": {"type": int, "help": "tokens of every synthetic prompt"},
        "response-length": {"type": int, "help": "tokens of synthetic responses, with EOS"},
    },
    "measurement": {
        "batch": {"type": int, "default": 4, "help": "pairs (examples, prompts) per step"},
        "steps": {"type": int, "default": 10, "help": "timed steps of each process"},
        "warmup": {"type": int, "default": 2, "help": "steps before them, not timed"},
        "rounds": {"type": int, "default": 3, "help": "processes of each side, in turn"},
        "precision": {"choices": ("fp32", "bf16"), "default": "fp32"},
        "device": {"choices": ("cpu", "cuda"), "default": "cpu"},
        "threads": {"type": int, "default": os.cpu_count() or 1, "help": "default: all cores"},
        "lr": {"type": float,
               "help": "default: 1e-4 for losses to move; CUDA bf16: 1e-5"},
        "seed": {"type": int, "default": 0, "help": "of weights and data"},
        "busy-ok": FLAG | {"help": "measure on a busy machine"},
    },
    "sides": {
        "task": {"choices": ("dpo", "sft", "reward", "decode"), "default": "dpo"},
        "samples": {"type": int, "default": 16, "help": "decode: completions per prompt"},
        "new-tokens": {"type": int, "default": 64, "help": "decode: tokens per completion"},
        "devices": {"type": int, "default": 1, "help": "processes that share each step"},
        "minutes": {"type": float, "help": "time limit: then report what is done or, with --keep, "
                                           "continue in the next command"},
        "sides": {"metavar": "A,B", "help": "only these: ours,trl-best, or trl, or both"},
        "candidate": {"action": "append", "default": [], "metavar": "NAME", "help":
                      "instead of trl-default and trl-best: TRL with these settings; may be "
                      "repeated"},
        "list-candidates": FLAG | {"help": "explain the names of candidates"},
        "ours": {"action": "append", "default": [], "metavar": "KEY=VALUE",
                 "help": "setting of dpo-run's sides"},
        "also": {"action": "append", "default": [], "metavar": '"KEY=VALUE ..."', "help":
                 "another side: dpo-run with these settings as well; may be repeated"},
        "search": FLAG | {"help": "try settings of the other side first"},
        "trl-python": {"metavar": "FILE", "default": "", "help": "Python with another TRL"},
        "keep": {"metavar": "FOLDER",
                 "help": "keep weights, rows and results in this folder for later commands"},
    },
    "output": {
        "json": FLAG | {"help": "end with one line of JSON"},
        "out": {"type": Path, "default": ROOT / "docs" / "benchmarks", "metavar": "FOLDER"},
        "work": {"metavar": "FOLDER", "help": "temporary folder for weights and rows"},
    },
}  # fmt: skip
EVERYTHING = tuple(OPTIONS)


def parser(
    doc: str | None, *, groups: Sequence[str] = EVERYTHING, without: Sequence[str] = (),
    more: dict[str, dict[str, Any]] | None = None, **defaults: Any,
) -> argparse.ArgumentParser:  # fmt: skip
    """A parser with the options of these groups except some, with other `defaults` and `more`
    options."""
    p = argparse.ArgumentParser(
        description=doc, epilog=DATA if "data" in groups else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parts = [("of this command", more or {}), *((name, OPTIONS[name]) for name in groups)]
    for title, options in parts:
        group = p.add_argument_group(title)
        for word, how in options.items():
            if word not in without:
                group.add_argument(f"--{word}", **how)
    p.set_defaults(**defaults)
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The checked arguments; options that `p` does not have get their defaults."""
    args = argparse.Namespace(**vars(parser(None).parse_args([])) | vars(p.parse_args(argv)))
    if not args.list_candidates:
        check(args)
    return args


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def refuse_unknown(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    if unknown := set(given) - set(known):
        raise SystemExit(f"--{option}: no {', '.join(sorted(unknown))}; give {', '.join(known)}")


def check(args: argparse.Namespace) -> None:
    """Fill in defaults that depend on others; exit with the problem of invalid arguments."""
    if args.lr is None:  # in bf16 on a GPU, larger steps part the sides' losses within ten steps
        args.lr = 1e-5 if (args.device, args.precision) == ("cuda", "bf16") else 1e-4
    if args.length is None:
        args.length = KNOWN[args.lengths_of].kept
    for why, applies in argument_problems(args).items():
        if applies:
            raise SystemExit(why)
    for name in args.candidate:
        settings_of(args.task, name)
        if args.batch % (parts := parts_of(name) * args.devices):
            raise SystemExit(
                f"--candidate {name}: --batch {args.batch} must be a multiple of {parts}"
            )
    if args.batch % args.devices:
        raise SystemExit(f"--batch {args.batch}: must be a multiple of --devices {args.devices}")


def argument_problems(args: argparse.Namespace) -> dict[str, object]:
    """Message of each possible problem -> whether the arguments have it."""
    fixed = args.prompt_length or args.response_length
    problems: dict[str, object] = {
        "--lengths, --prompt-length, --response-length: of synthetic pairs; leave out --data": (
            args.data and (fixed or args.lengths_of != "hh")
        ),
        "--lora: only with --task dpo": args.lora != "none" and args.task != "dpo",
        "--devices: measures training": args.devices > 1 and args.task == "decode",
        "--candidate: names what --search would look for; leave one out": (
            args.candidate and args.search
        ),
        "--keep: also holds weights and rows; leave out --work": args.keep and args.work,
        "--ours: write KEY=VALUE, as for dpo-run": not all("=" in word for word in args.ours),
        '--also: write "KEY=VALUE KEY=VALUE", as for dpo-run': not all(
            words.split() and all("=" in word for word in words.split()) for words in args.also
        ),
        "--also: only for training, not for --task decode": args.also and args.task == "decode",
    }  # fmt: skip
    for path in (args.data, args.tokenizer, args.trl_python):
        problems[f"{path}: no such file or folder"] = path and not Path(path).exists()
    counts = ("warmup", "steps", "rounds", "batch", "threads", "devices", "r")
    low = [f"--{name}" for name in counts if getattr(args, name) < 1]
    problems[f"{', '.join(low)}: must be at least 1"] = low
    return problems
