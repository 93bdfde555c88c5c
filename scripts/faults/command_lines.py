"""Random command lines: valid or misspelled keys with valid or absurd values.

Each must end within seconds, with a documented exit code, without a traceback, and leave no file:
all are dry runs, in forks of a process that has done the imports.
"""

from __future__ import annotations

import os
import random
import resource
from collections import Counter
from pathlib import Path

from scripts.faults.lab import Failed, Lab

LINES = 2_000
CODES = {0, 2, 3, 4, 5, 6, 74, 75}  # of the README
SECONDS = 5.0
SWEEP_SECONDS = 60.0  # a sweep starts processes, each of which imports torch
SWEEPS = ("-m", "--multirun", "hydra.mode=MULTIRUN")
ABSURD = [
    "", "null", "true", "0", "-1", "1e308", "-1e308", "nan", "inf", "-inf", "9" * 400, "0.5",
    "1e-320", "x", "x" * 3000, "'a b'", "'\u2028'", "'\x1b[31mred'", "'\x00'", "[]", "[1,2]",
    "[[1],[2]]",
    "[null]", "{}", "{a: 1}", "{a: {b: [1]}}", "'{'", "${seed}", "${no.such}", "${oc.env:HOME}",
    "${oc.env:NO_SUCH}", "'${'", "???", "..", "/", "~", "'../../x'", "0x10", "1_000", "1,2",
    "'ünïcödé'", "'\ud83d\ude00'", "-", "+", "=", "'='", "\\", "'", "2026-02-30",
    "99999999999999999999", "9" * 5000, "1e400", "${", "${..seed}", "${.name}", "${model}",
    "${oc.decode:'1'}", "${oc.create:{a:1}}", "${hydra:run.dir}", "${hydra:nothing}", "{1:2}",
    "range(1,3)", "choice(1)", "sort(3,1)", "glob(*)", "interval(0,1)", "tag(a,1)", "int(1.5)",
    "float(a)", "str([1])", "json_str(a)", "extend_list(1)", "(", "[1,", "{a:", "a\nb", "\udcff",
    "/dev/zero", "/proc/self/mem", "~nobody/x", "x" * 300, "$(id)", "%s{}%n", "\u202e",
]  # fmt: skip
WORDS = [
    "resume=nowhere", "recipe=nothing", "-m", "--cfg", "job", "--help", "-h", "--hydra-help",
    "--info", "--multirun", "--config-name=x", "--config-dir=.", "--resolve", "--package",
    "hydra.run.dir=x", "hydra.sweep.dir=x", "hydra/launcher=slurm", "hydra.mode=MULTIRUN",
    "=", "=1", "a", "a=",
    ".=1", "..a=1", "stage.=1", "stage..beta=1", "@", "stage@x=dpo", "~stage", "~stage.beta",
    "~seed=1", "+", "++", "--", "-", "seed", "seed==1", "preset=qwen3-8b-qlora-24gb", "preset=no",
    "hydra.run.dir=${..seed}", "hydra.job.env_set={A:{b:1}}", "hydra.job.name=[1]",
    "hydra.searchpath=5", "hydra.callbacks.a._target_=os.system", "_target_=x", "data._target_=x",
    "data=[1,2]", "data@data.x=jsonl", "defaults=[]", "vars.x=1", "a:b=1", "[a]=1", "$x=1",
    "stage.name=[1]", "lora.name=[1]",
]  # fmt: skip


def command_lines(seed: int, count: int) -> list[list[str]]:
    """Random command lines, reproducible by seed."""
    from dpo_cli.config.hints import TABLES, groups, option_schema
    from dpo_cli.config.keys import facts

    rng = random.Random(seed)
    options = {group: sorted(TABLES.get(group, {})) for group in groups()}
    options = {group: names for group, names in options.items() if names}
    keys = {group: {name: list(facts(option_schema(group, name)())) for name in names}
            for group, names in options.items()}  # fmt: skip
    return [_line(rng, options, keys) for _ in range(count)]


def _line(rng: random.Random, options: dict, keys: dict) -> list[str]:
    words, chosen = [], {}
    for group in rng.sample(sorted(options), rng.randint(0, 3)):
        chosen[group] = rng.choice(options[group])
        words.append(f"{group}={chosen[group] if rng.random() < 0.9 else rng.choice(ABSURD)}")
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.15:
            words.append(rng.choice(WORDS))
            continue
        group = rng.choice(sorted(options))
        name, value, fact = rng.choice(keys[group][chosen.get(group, options[group][0])])
        key = _misspelled(rng, f"{group}.{name}") if rng.random() < 0.1 else f"{group}.{name}"
        words.append(f"{rng.choice(['', '', '', '+', '++'])}{key}={_value(rng, value, fact)}")
    rng.shuffle(words)
    return words


def _misspelled(rng: random.Random, key: str) -> str:
    index = rng.randrange(len(key))
    return key[:index] + rng.choice(["", "x", ".", "_"]) + key[index + 1 :]


def _value(rng: random.Random, value: object, fact: object) -> str:
    kind = rng.random()
    if kind < 0.35 and getattr(fact, "choices", ()):
        return rng.choice(fact.choices)  # type: ignore[attr-defined]
    if kind < 0.5:
        return "null" if value is None else str(value).replace(" ", "")
    if kind < 0.6 and isinstance(value, (int, float)):
        return str(value * rng.choice([2, -1, 10**6, 1e-9]))
    return rng.choice(ABSURD)


def random_command_lines(lab: Lab) -> str:
    """Case B29; raises Failed with the offending command line."""
    lab.preload()
    count = int(os.environ.get("DPO_RUN_FUZZ_LINES", LINES))
    codes: Counter[int] = Counter()
    slowest = 0.0
    before = _files(lab.folder)
    for words in command_lines(lab.seed, count):
        start = _cpu_seconds()
        try:
            done = lab._fork(
                [*_few_reviews(words), *words, "hardware=cpu", "dry_run=true"], None, 300
            )
        except ValueError:  # a NUL, which process arguments cannot contain
            continue
        codes[done.code] += 1
        seconds = _cpu_seconds() - start
        slowest = slowest if any(word in SWEEPS for word in words) else max(slowest, seconds)
        most = SWEEP_SECONDS if any(word in SWEEPS for word in words) else SECONDS
        left = _files(lab.folder) - before
        problem = next((problem for problem, seen in (
            ("a traceback", "Traceback" in done.output), ("too slow", seconds > most),
            ("an undocumented exit code", done.code not in CODES), (f"files {left}", left),
        ) if seen), None)  # fmt: skip
        if problem is not None:
            raise Failed(f"{problem}: {words!r}: exit {done.code}, {done.last}")
    counts = ", ".join(f"{code}: {times}" for code, times in sorted(codes.items()))
    slow = f"the slowest beside sweeps {slowest:.1f} s"
    return f"{sum(codes.values()):,} lines, by exit code {counts}; {slow}"


def _few_reviews(words: list[str]) -> list[str]:
    """Overrides to put first: a plan of the default data would generate 4,000 reviews."""
    chosen = [word.partition("=")[2] for word in words if word.startswith("data=")]
    return ["data.rows=40", "data.eval_rows=8"] if chosen in ([], ["sentiment"]) else []


def _cpu_seconds() -> float:
    """CPU time of all children so far, which other load on the machine does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if path.name != "fork.txt"}
