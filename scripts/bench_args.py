"""The command line of `bench.py`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench_launch import ROOT
from bench_lengths import KNOWN, LENGTHS
from bench_lora import LORA
from bench_shapes import CHANGEABLE, PRESETS
from bench_sides import parts_of, settings_of

GROW_LENGTHS = (32, 64, 128, 256, 512, 1024)

DATA = """\
data: by default synthetic pairs of random words. Their lengths are drawn from log-normal
distributions fitted to Anthropic HH (harmless-base/test in GPT-2's tokens: prompts of 124 on
average, median 96; chosen 42, rejected 52), so that a third of a padded batch of 4 is unique
tokens and the rest padding and repeated prompts, as there. --lengths tldr: prompts of about 350
and responses of 35, --lengths ultrafeedback: of about 180 and 350 with a long tail; both assumed.
--prompt-length and --response-length fix them. --data FILE --adapter hh takes real pairs: a
seeded sample, read as dpo-run reads it, with --tokenizer FOLDER or else a byte-level BPE learned
from the file. Nothing is downloaded."""


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
    data.add_argument(
        "--lengths", choices=LENGTHS, default="hh", dest="lengths_of", help="of synthetic pairs"
    )
    data.add_argument(
        "--length", type=int, help="tokens of prompt and response kept: 512, or 1024 for the others"
    )
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
    how.add_argument("--lr", type=float, help="default: 1e-4 for losses to move; CUDA bf16: 1e-5")
    how.add_argument("--seed", type=int, default=0, help="of weights and data")
    how.add_argument("--samples", type=int, default=16, help="decode: completions of a prompt")
    how.add_argument("--new-tokens", type=int, default=64, help="decode: tokens of a completion")
    how.add_argument("--devices", type=int, default=1, help="processes that share a step")
    how.add_argument(
        "--minutes",
        type=float,
        help="stop by then: report what is done or, with --keep, go on in the next command",
    )
    how.add_argument("--sides", metavar="A,B", help="only these: ours,trl-best, or trl, or both")
    how.add_argument(
        "--candidate", action="append", default=[], metavar="NAME",
        help="instead of trl-default and trl-best: TRL with these settings; may be repeated",
    )  # fmt: skip
    how.add_argument("--list-candidates", action="store_true", help="how their names are made")
    how.add_argument(
        "--ours", action="append", default=[], metavar="KEY=VALUE", help="of dpo-run's sides"
    )
    how.add_argument(
        "--also", action="append", default=[], metavar='"KEY=VALUE ..."',
        help="another side: dpo-run with these settings as well; may be repeated",
    )  # fmt: skip
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
    """Fill in defaults that depend on others; exit with what is wrong with the arguments."""
    if args.lr is None:  # in bf16 on a GPU, larger steps part the sides' losses within ten steps
        args.lr = 1e-5 if (args.device, args.precision) == ("cuda", "bf16") else 1e-4
    if args.length is None:
        args.length = KNOWN[args.lengths_of].kept
    fixed = args.prompt_length or args.response_length
    alone = args.task == "decode" or args.grow
    refused = {
        f"--grow: measures --task dpo, not {args.task}": args.grow and args.task != "dpo",
        "--grow: takes synthetic pairs, leave out --data": args.grow and args.data,
        "--lengths, --prompt-length, --response-length: of synthetic pairs; leave out --data": (
            args.data and (fixed or args.lengths_of != "hh")
        ),
        "--lora: measures --task dpo, without --grow": (
            args.lora != "none" and (args.task != "dpo" or args.grow)
        ),
        "--devices: measures training without --grow": args.devices > 1 and alone,
        "--candidate: names what --search would look for; leave one out": (
            args.candidate and args.search
        ),
        "--candidate, --also: name sides; leave out --grow": (
            (args.candidate or args.also) and args.grow
        ),
        "--keep: is also where weights and rows lie; leave out --work": args.keep and args.work,
        "--ours: write KEY=VALUE, as for dpo-run": not all("=" in word for word in args.ours),
        '--also: write "KEY=VALUE KEY=VALUE", as for dpo-run': not all(
            words.split() and all("=" in word for word in words.split()) for words in args.also
        ),
        "--also: of training; --task decode has no settings": args.also and args.task == "decode",
    }  # fmt: skip
    for path in (args.data, args.tokenizer, args.trl_python):
        refused[f"{path}: no such file or folder"] = path and not Path(path).exists()
    counts = ("warmup", "steps", "rounds", "batch", "threads", "devices", "r")
    low = [f"--{name}" for name in counts if getattr(args, name) < 1]
    refused[f"{', '.join(low)}: must be at least 1"] = low
    for why, is_so in refused.items():
        if is_so:
            raise SystemExit(why)
    for name in args.candidate:
        settings_of(args.task, name)
        if args.batch % (parts := parts_of(name) * args.devices):
            raise SystemExit(
                f"--candidate {name}: --batch {args.batch} must be a multiple of {parts}"
            )
    if args.batch % args.devices:
        raise SystemExit(f"--batch {args.batch}: must be a multiple of --devices {args.devices}")
