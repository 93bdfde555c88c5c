"""The command line of `bench.py`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench_launch import ROOT
from bench_lora import LORA
from bench_shapes import CHANGEABLE, PRESETS

GROW_LENGTHS = (32, 64, 128, 256, 512, 1024)

DATA = """\
data: by default synthetic pairs of random words. Their lengths are drawn from log-normal
distributions fitted to Anthropic HH (harmless-base/test in GPT-2's tokens: prompts of 124 on
average, median 96; chosen 42, rejected 52), so that a third of a padded batch of 4 is unique
tokens and the rest padding and repeated prompts, as there. --prompt-length and
--response-length fix them. --data FILE --adapter hh takes real pairs: a seeded sample, read as
dpo-run reads it, with --tokenizer FOLDER or else a byte-level BPE learned from the file.
Nothing is downloaded."""


def parser(description: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=description, epilog=DATA, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--task", choices=("dpo", "sft", "reward", "decode"), default="dpo")
    add_model_and_data(p)
    add_measurement(p.add_argument_group("measurement"))
    out = p.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="end with one line of JSON")
    out.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", metavar="FOLDER")
    out.add_argument("--work", metavar="FOLDER", help="where weights and rows lie meanwhile")
    out.add_argument(
        "--keep",
        metavar="FOLDER",
        help="where they stay, with all answers, for later commands",
    )
    return p


def add_model_and_data(p: argparse.ArgumentParser) -> None:
    model = p.add_argument_group("model")
    model.add_argument("--preset", choices=PRESETS, default="tiny4x256")
    for name in CHANGEABLE:
        model.add_argument(f"--{name}", type=int, help="instead of the preset's")
    model.add_argument(
        "--lora", choices=LORA, default="none", help="of every linear layer; --task dpo"
    )
    model.add_argument("--r", type=int, default=16, help="rank of the adapter; alpha is twice that")
    model.add_argument("--tokenizer", metavar="FOLDER", help="default: see data")
    data = p.add_argument_group("data")
    data.add_argument("--data", metavar="FILE", help="real pairs; default: synthetic ones")
    data.add_argument("--adapter", default="jsonl", help="how FILE is read: hh, jsonl, ...")
    data.add_argument("--length", type=int, default=512, help="tokens of prompt and response kept")
    data.add_argument("--prompt-length", type=int, help="tokens of every synthetic prompt")
    data.add_argument("--response-length", type=int, help="tokens of synthetic responses, with EOS")


def add_measurement(how: argparse._ArgumentGroup) -> None:
    cores = os.cpu_count() or 1
    how.add_argument("--batch", type=int, default=4, help="pairs (examples, prompts) a step")
    how.add_argument("--steps", type=int, default=10, help="timed steps of each process")
    how.add_argument("--warmup", type=int, default=2, help="steps before them, not timed")
    how.add_argument("--rounds", type=int, default=3, help="processes of each side")
    how.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    how.add_argument("--threads", type=int, default=cores, help="default: all cores")
    how.add_argument("--lr", type=float, default=1e-4, help="large enough for losses to move")
    how.add_argument("--seed", type=int, default=0, help="of weights and data")
    how.add_argument("--samples", type=int, default=16, help="decode: completions of a prompt")
    how.add_argument("--new-tokens", type=int, default=64, help="decode: tokens of a completion")
    how.add_argument("--devices", type=int, default=1, help="processes that share a step")
    how.add_argument(
        "--minutes", type=float, help="stop by then; the next command goes on (--keep)"
    )
    how.add_argument("--sides", metavar="A,B", help="only these: ours,trl-best, or trl, or both")
    how.add_argument(
        "--ours", action="append", default=[], metavar="KEY=VALUE", help="of dpo-run's sides"
    )
    how.add_argument("--search", action="store_true", help="try the other side's settings first")
    how.add_argument("--trl-python", metavar="FILE", default="", help="Python with another TRL")
    how.add_argument("--busy-ok", action="store_true", help="measure on a busy machine")
    how.add_argument(
        "--grow", choices=("prompts",), help="only: cost of a pair by prompt length, ours and plain"
    )
    how.add_argument("--grow-lengths", type=lengths, default=GROW_LENGTHS, metavar="32,64,...")


def lengths(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def check(args: argparse.Namespace) -> None:
    """Exit with what is wrong with the arguments."""
    fixed = args.prompt_length or args.response_length
    alone = args.task == "decode" or args.grow
    refused = {
        f"--grow: measures --task dpo, not {args.task}": args.grow and args.task != "dpo",
        "--grow: takes synthetic pairs, leave out --data": args.grow and args.data,
        "--prompt-length, --response-length: of synthetic pairs; leave out --data": (
            args.data and fixed
        ),
        "--lora: measures --task dpo, without --grow": (
            args.lora != "none" and (args.task != "dpo" or args.grow)
        ),
        "--devices: measures training without --grow": args.devices > 1 and alone,
        "--minutes: needs --keep FOLDER, where the next command finds what is done": (
            args.minutes is not None and not args.keep
        ),
        "--keep: is also where weights and rows lie; leave out --work": args.keep and args.work,
        "--ours: write KEY=VALUE, as for dpo-run": not all("=" in word for word in args.ours),
    }  # fmt: skip
    for path in (args.data, args.tokenizer, args.trl_python):
        refused[f"{path}: no such file or folder"] = path and not Path(path).exists()
    counts = ("warmup", "steps", "rounds", "batch", "threads", "devices", "r")
    low = [f"--{name}" for name in counts if getattr(args, name) < 1]
    refused[f"{', '.join(low)}: must be at least 1"] = low
    for why, is_so in refused.items():
        if is_so:
            raise SystemExit(why)
    if args.batch % args.devices:
        raise SystemExit(f"--batch {args.batch}: must be a multiple of --devices {args.devices}")
