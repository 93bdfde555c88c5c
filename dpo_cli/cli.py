"""`dpo-run`: from the command line to one run, a sweep or a recipe.

Hydra composes the configuration; it neither makes folders nor runs anything but sweeps.
A user's mistake is reported in one line with an exit code; a bug keeps its traceback.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli.config.paths import conf_dir
from dpo_cli.config.usage import quick_answer
from dpo_cli.distributed import launch
from dpo_cli.durable.refusals import as_refusal, warn_outside_calls
from dpo_cli.errors import ConfigError, PeerLost, UserError
from dpo_cli.escapes import escape_messages, in_one_line, say
from dpo_cli.report.output import copied_output, go_on_in, outlast_terminals
from dpo_cli.surroundings import ensure_home, restart_in_utf8

if TYPE_CHECKING:  # Hydra takes 0.2 s to import, which --help does without
    from omegaconf import DictConfig

    from dpo_cli.config import RunConfig

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the signal, as shells have it


def main(argv: list[str] | None = None) -> None:
    """Run the command; exits with the code of `errors.py` unless all went well.

    Errors of the operating system, anywhere, are reported as the user's, too.
    """
    if argv is None:
        restart_in_utf8()
    escape_messages()
    warn_outside_calls()
    words = sys.argv[1:] if argv is None else list(argv)
    with copied_output():
        code = _exit_code(words)
    if code:
        sys.exit(code)


def _exit_code(words: list[str]) -> int:
    """Run the command and report its error, if any; returns the exit code."""
    try:
        answer = quick_answer(words)
        if answer is not None:
            print(answer)
        code = 0 if answer is not None else dispatch(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        outlast_terminals()
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe: `| head`
        return BROKEN_PIPE
    except Exception as error:
        outlast_terminals()
        user_error = error if isinstance(error, UserError) else as_refusal(error)
        if user_error is None:
            raise
        return report_error(user_error) if launch.rank() is None else fail_together(user_error)


def fail_together(error: UserError) -> int:
    """Of many ranks that fail for one reason, the launcher reports it; without ours, the first."""
    if isinstance(error, PeerLost):
        return error.exit_code
    launch.record_error(error)
    if launch.rank() == 0:
        if not launch.launched_by_us():
            report_error(error)
        launch.release_ranks(error.exit_code)
    return error.exit_code


def report_error(error: UserError) -> int:
    """Print the error; several problems as a list."""
    problems = [line for line in str(error).split("\n") if line.strip()] or [type(error).__name__]
    several = [f"error: {len(problems)} problems", *(f"  {line}" for line in problems)]
    lines = several if len(problems) > 1 else [f"error: {problems[0]}"]
    say("\n".join(map(in_one_line, lines)), error=True)
    return error.exit_code


def dispatch(words: list[str]) -> int:
    from dpo_cli.config.flags import parse_flags
    from dpo_cli.config.hydra import composed, quiet_hydra, with_new_names

    # Of libraries' own children too (compilers, launchers): none imports from the current folder.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    os.environ.setdefault("USE_HUB_KERNELS", "NO")  # transformers fetches code for some families
    if words[:1] in (["convert"], ["runs"]):  # they start no run
        return int(getattr(import_module(f"dpo_cli.workflow.{words[0]}"), words[0])(words[1:]))
    quiet_hydra()
    ensure_home()
    if launch.rank() is not None:
        launch.end_with_launcher()
    if launch.rank():
        _let_segments_grow()
        return _run_rank(words)
    if any(word.startswith("recipe=") for word in words):
        from dpo_cli.workflow.recipe import run_recipe

        _refuse_ranks("a recipe")
        return run_recipe(words)
    folder = _resume_folder(words)
    expanded = with_new_names(_stored_command(folder, words) if folder else words)
    args = parse_flags(expanded)
    if args.cfg or args.info or args.hydra_help or args.shell_completion:
        _ask_hydra(args)
        return 0
    if args.multirun or "hydra.mode=MULTIRUN" in args.overrides:
        _refuse_ranks("a sweep")
        return _sweep(args)
    return _run(composed(args.overrides, args.config_name), words)


def _resume_folder(words: Sequence[str]) -> Path | None:
    """The folder of `resume=<folder>`; plain `resume=true` stays a key of the run."""
    given = [word.partition("=")[2] for word in words if word.startswith("resume=")]
    folders = [value for value in given if value.lower() not in ("true", "false")]
    if not folders:
        return None
    if len(given) > 1 or any(word.startswith("run_dir=") for word in words):
        raise ConfigError(f"resume={folders[0]}: names the run folder; give it once, no run_dir")
    return Path(os.path.expanduser(folders[0]))


def _stored_command(folder: Path, words: Sequence[str]) -> list[str]:
    """The command that started the run in `folder`; new overrides take precedence."""
    from dpo_cli import run_folder
    from dpo_cli.config.literals import as_override

    extra = [word for word in words if not word.startswith("resume=")]
    extra += [as_override("run_dir", str(folder)), "resume=true"]
    merged = run_folder.merge_overrides(run_folder.stored_overrides(folder), extra)
    if any(word.startswith(("--config-", "-cd", "-cn")) for word in words):
        return merged
    return merged + run_folder.stored_composed_with(folder)


def _ask_hydra(args: Namespace) -> None:
    """Hydra's own answers: --cfg, --info, --hydra-help, shell completion."""
    try:
        _hydra_main(args)
    except ConfigError:
        if not args.shell_completion:  # there a line may be incomplete
            raise


def _hydra_main(args: Namespace, extra: Sequence[str] = ()) -> None:
    import hydra

    from dpo_cli.config.flags import unparse_flags
    from dpo_cli.config.hydra import HYDRA_VERSION, ODD
    from dpo_cli.config.hydra_errors import as_config_error
    from dpo_cli.workflow.sweep import run_job

    overrides = [*args.overrides, *extra]
    sys.argv = [sys.argv[0], *overrides, *unparse_flags(args)]
    entry = hydra.main(
        version_base=HYDRA_VERSION, config_path=str(conf_dir()), config_name="config"
    )
    with as_config_error(overrides, *(() if args.multirun else ODD)):  # else it only composes
        entry(run_job)()


def _refuse_ranks(what: str) -> None:
    if launch.rank() is not None:
        raise ConfigError(f"torchrun: starts one run, not {what}; use dpo-run hardware.devices=")


def _run_rank(words: list[str]) -> int:
    """A rank other than the first, which sends it the configuration."""
    config, code = launch.receive_config()
    if config is None:
        return code
    go_on_in(Path(config.run_dir))
    from dpo_cli.run import run

    with launch.process_group(config):
        run(config, ["dpo-run", *words])
    return 0


def _run(cfg: DictConfig, words: list[str]) -> int:
    """Check everything that can be checked cheaply, then claim the folder and run."""
    from dpo_cli import run_folder
    from dpo_cli.config import spec_of
    from dpo_cli.config.read import prepare

    config = prepare(cfg, words)
    config = config if launch.rank() is None else launch.with_launched_ranks(config)
    chosen = config.run_dir or (cfg.hydra.run.dir if cfg.hydra.run.dir != "." else "")
    if not chosen and not spec_of(config.stage).keeps_folder:
        with tempfile.TemporaryDirectory(prefix="dpo-run-") as scratch:
            return _start(cfg, config, Path(scratch), words)
    folder = Path(chosen) if chosen else run_folder.default_run_dir(config)
    if config.resume and not chosen:
        raise ConfigError("resume=true: needs the run to resume; give resume=<run folder>")
    if launch.rank() is None and launch.on_several_nodes(config):
        go_on_in(folder)
        return launch.launch_ranks(config, words)  # the first rank checks the folder
    try:
        return _start(cfg, config, folder, words)
    except UserError:
        if not chosen:
            run_folder.remove_bare(folder)
        raise


def _start(cfg: DictConfig, config: RunConfig, folder: Path, words: list[str]) -> int:
    """Claim the folder and run, here or in one process per device."""
    from dpo_cli import run_folder
    from dpo_cli.config import spec_of

    leading = launch.rank() is not None
    run_folder.check_free(folder, config.resume)
    config.run_dir = str(folder)
    config.resume &= not run_folder.is_bare(folder)  # else it never started
    environment = {str(key): str(value) for key, value in cfg.hydra.job.env_set.items()}
    os.environ.update(environment)
    _let_segments_grow()
    if config.dry_run:
        from dpo_cli.plan.dry_run import print_plan

        print_plan(config)
        if leading:
            launch.broadcast_config(None)
        return 0
    if not leading and launch.is_distributed(config):
        go_on_in(folder)
        return launch.launch_ranks(config, words)
    with run_folder.claimed(folder, cfg, config.resume):
        if spec_of(config.stage).keeps_folder:  # else what is printed is all there is
            go_on_in(folder)
        # Importing torch takes seconds, in which another start must find the folder taken.
        from dpo_cli.run import run
    if leading:
        launch.broadcast_config(config, environment=environment)
    with launch.process_group(config) if leading else nullcontext():
        run(config, ["dpo-run", *words])
    return 0


def _let_segments_grow() -> None:
    """Packs differ in length in every micro-batch, which would fragment the fixed segments of
    PyTorch's CUDA allocator. It reads this when torch is imported."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name: the user's choice
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _sweep(args: Namespace) -> int:
    """Let Hydra run the jobs, then summarize."""
    from dpo_cli.config.hydra import composed, first_job, for_every_option
    from dpo_cli.workflow import sweep

    if any(word.startswith("run_dir=") for word in args.overrides):
        remedy = "each job of a sweep has its own folder; use hydra.sweep.dir=<folder>"
        raise ConfigError(f"run_dir: {remedy}")
    resume = any(word.lower() == "resume=true" for word in args.overrides)
    args.overrides = [word for word in args.overrides if not word.startswith("resume=")]
    cfg = composed(first_job(args.overrides), args.config_name)
    words, args.overrides = args.overrides, for_every_option(args.overrides)
    if cfg.dry_run:
        with tempfile.TemporaryDirectory(prefix="dpo-run-") as name:
            with sweep.claimed(name, words):
                _hydra_main(args, [f"hydra.sweep.dir={name}"])
            return sweep.exit_code(sweep.recorded_jobs(Path(name)))
    with sweep.claimed(cfg.hydra.sweep.dir, words, resume) as folder:
        return _finished_sweep(args, folder, resume)


def _finished_sweep(args: Namespace, folder: Path, resumed: bool) -> int:
    from dpo_cli.config.literals import as_override
    from dpo_cli.workflow import sweep

    place = as_override("hydra.sweep.dir", str(folder))
    try:
        _hydra_main(args, [place, "hydra.output_subdir=null"])  # jobs write their own .hydra/
    except ConfigError:
        if not resumed and not sweep.recorded_jobs(folder):
            shutil.rmtree(folder)  # all in it is ours: it was empty when claimed
        raise
    except KeyboardInterrupt:
        return sweep.finish(folder) or INTERRUPTED
    return sweep.finish(folder)
