"""The rows of the table: number, injected fault, required outcome, and check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scripts.faults import (
    beyond,
    command_lines,
    damage,
    hostile,
    kills,
    ranks,
    refused,
    runs,
    saves,
    terminals,
    workflows,
)
from scripts.faults.covered import by_tests
from scripts.faults.lab import Lab


@dataclass(frozen=True)
class Case:
    """run: injects the fault and returns the outcome; raises Failed if that is not the required
    one."""

    number: str
    name: str
    required: str
    run: Callable[[Lab], str]


def row(
    number: int | str, name: str, required: str, run: Callable[[Lab], str] | None = None
) -> Case:
    """run: None if tests cover the case."""
    return Case(str(number), name, required, run or by_tests(str(number)))


CASES = [
    row(1, "kill -9 at random points after the first save: sft, dpo, reward, ppo, lora",
        "every start resumes, final sha256 as uninterrupted", saves.kill_loop),
    row(2, "kill -9 before every file-system operation of a save",
        "every resume works, identical", saves.operations_of_a_save),
    row(3, "half-written file, then kill -9", "every resume works, identical", saves.half_written),
    row(4, "resume at every step, dropout on, across an epoch's end", "all identical",
        runs.every_step),
    row(5, "resume LoRA; LoRA on an SFT adapter", "identical"),
    row(6, "newest checkpoint: each file missing, truncated, zeroed",
        "falls back, reports it, identical", damage.damaged_files),
    row(7, "one bit flipped in weights, optimizer state, generators, state",
        "caught by sha256, falls back", damage.flipped_bits),
    row(8, "empty newer folder; stale temporary folder", "ignored", damage.leftovers),
    row(9, "trace one save", "files and folder synced, the rename last", saves.trace),
    row(10, "disk full at 2.15, 2.5, 2.9 checkpoints",
        "exit 74, names the disk, resumes when there is space", damage.disk_full),
    row(11, "disk full while writing the final model over a good one", "the old one intact",
        damage.disk_full_at_the_end),
    row(12, "prune with skewed mtimes, keep 2", "newest steps kept",
        damage.prune_with_skewed_times),
    row(13, "kill -9 before every operation of a prune", "newest still valid",
        saves.killed_in_a_prune),
    row(14, "SIGTERM, SIGUSR1, SIGINT", "saves, exit 75, resume identical", runs.signals),
    row(15, "SIGTERM in the middle of a step", "as 14; nothing half-trained is final",
        runs.mid_step),
    row(16, "a second signal during the save", "a valid checkpoint is left", runs.second_signal),
    row(17, "two runs in one folder", "the second exits 6 within 2 s", runs.two_runs),
    row(18, "stale lock of a dead process", "taken over, logged", runs.stale_lock),
    row(19, "fresh run in a used folder", "refused, or resumed on request", runs.used_folder),
    row(20, "resume with another seed, order, rows, beta, max_length", "refused with a diff",
        runs.other_settings),
    row(21, "resume with another learning rate", "applied or refused, never ignored",
        runs.other_rate),
    row(22, "a DPO checkpoint's own folder given as the policy",
        "the reference must be named", runs.own_reference),
    row(23, "2 processes, kill -9 of one rank", "non-zero exit < 30 s; resume identical",
        ranks.killed_rank),
    row(24, "one rank raises", "non-zero exit, cause shown", ranks.raising_rank),
    row(25, "one rank hangs, timeout 20 s", "abort < 40 s with stacks", ranks.hanging_rank),
    row(26, "resume on another number of ranks", "every sample exactly once"),
    row(27, "checkpoint of 2 ranks read by 1, 2, 3, 4", "identical weights", ranks.other_ranks),
    row(28, "clean exits of 2 processes", "all exit codes 0", ranks.clean_exits),
    row(29, "NaN weight; learning rate 1e20",
        "stops before the step, exit 4, last good checkpoint kept", runs.not_finite),
    row(30, "out of memory above micro-batch k (injected)",
        "halves on all ranks; gradients to 1e-6"),
    row(31, "micro-batches 1x4, 2x2, 4x1; packed as padded",
        "gradients 1e-6, log-probs 1e-5; step-0 DPO loss ln 2"),
    row(32, "fuzzed rows, >= 300 batches", "no crash, finite, each dropped row counted"),
    row(33, "empty or blank completion", "rejected, with the row's number"),
    row(34, "None, int, missing column", "one line: row and field"),
    row(35, "chosen == rejected, also only after truncation", "dropped, counted"),
    row(36, "prompt > max_length: one row; all rows", "counted; clear error"),
    row(37, "long completions", "EOS handled, both sides keep the same context"),
    row(38, "`<eos>` in user text; BOS in the prompt; pad = eos; a 2 MB row; NUL and emoji",
        "literal text; one BOS; EOS trained; runs"),
    row(39, "config typo, `+typo`, beta = -1, a sweep with one failing job",
        "exit 2 with a suggestion; the other jobs finish, the sweep exits non-zero"),
    row(40, "evil pickle, `_target_`, `../` in names, `<script>`, a token in the environment, a "
        "hung judge, a judge told to ignore its instructions",
        "nothing runs or escapes, HTML escaped, no token in a file, time bounded, verdict "
        "unchanged"),
    row("B1", "a recipe killed between and inside steps", "continues, identical",
        beyond.killed_recipe),
    row("B2", "outputs of a finished recipe step truncated", "never reused; reason reported",
        beyond.half_written_step),
    row("B3", "two recipes in one folder", "the second is refused", beyond.other_recipe),
    row("B4", "a step whose inputs changed", "rerun, with the reason", beyond.changed_inputs),
    row("B5", "a sweep killed, partly failed, modified", "continues; no partial file reused"),
    row("B6", "caches of reference log-probs and rows damaged", "recomputed, identical",
        beyond.torn_caches),
    row("B7", "sampled and labeled files damaged", "refused by their checksum"),
    row("B8", "PPO killed or stopped by a signal inside a rollout",
        "resumes at a rollout's boundary"),
    row("B9", "a checkpoint of another layout", "refused, with a message", beyond.older_layout),
    row("B10", "the same recipe twice at once", "the second is refused"),
    row("B11", "modules with the names of libraries in the current folder: sweep, ranks",
        "no code but ours runs", hostile.current_folder),
    row("B12", "config.json and index files that name code or files elsewhere, or absurd sizes",
        "exit 2 in one line, before anything is built", hostile.model_folder),
    row("B13", "adapter_config.json with expressions that do not end, wrong types, absurd sizes",
        "exit 2 in one line", hostile.adapter_folder),
    row("B14", "chat templates that loop, read files or exhaust memory", "exit 2 in one line",
        hostile.chat_template),
    row("B15", "a secret from environment, override, recipe and URL: runs, sweeps, recipes",
        "in no file, whatever its format"),
    row("B16", "random values in a model's, an adapter's and a recipe's files",
        "read, or refused in one line, within seconds"),
    row("B17", "kill -9 before every operation on files of a run's start and end",
        "it starts or resumes, identical, no incomplete file is left", kills.start_and_end),
    row("B18", "kill -9 before every operation on files of sample, label, evaluate, export",
        "as B17", kills.other_stages),
    row("B19", "kill -9 before every operation of a recipe's and a sweep's own files",
        "the same command continues, no incomplete file is left", workflows.own_files),
    row("B20", "kill -9 before every operation of the caches of rows and log-probs",
        "recomputed, identical, no incomplete file is left", kills.caches),
    row("B21", "an adapter's base weights change: resume, evaluate, export, merge",
        "refused with a diff, or a note if allowed", terminals.other_base),
    row("B22", "the terminal goes away: closed pipe, full disk, closed streams, SIGHUP, nohup",
        "continues, or saves and exits 75; console.log is complete", terminals.gone),
    row("B23", "no file locks, EFBIG, EIO, a full disk, a quota, a read-only disk",
        "exit 74, one line with a specific remedy", refused.by_the_system),
    row("B24", "resume in a locale without UTF-8", "same settings, same folder",
        refused.other_locale),
    row("B25", "rows, lines, cells, files beyond their limits; a .gz that expands a thousandfold",
        "refused in bounded memory, with the key to raise the limit; long texts are truncated"),
    row("B26", "cache entries that vanish, are unreadable, or change while they are read",
        "recomputed; the cache's permissions are kept"),
    row("B27", "recipes with alias bombs, deep nesting and values of wrong types",
        "exit 2, one line"),
    row("B28", "judges without a verdict, non-finite scores, duplicate keys and columns",
        "exit 3 or 4, no result"),
    row("B29", "random command lines: valid or misspelled keys, with absurd values",
        "a documented exit code, no traceback, no file, at most 5 s",
        command_lines.random_command_lines),
]  # fmt: skip
