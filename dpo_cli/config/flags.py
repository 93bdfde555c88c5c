"""Hydra's own flags on the command line of `dpo-run`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser  # no public way to them; hydra is pinned

from dpo_cli.config.literals import as_override
from dpo_cli.errors import ConfigError


def parse_flags(words: Sequence[str]) -> Namespace:
    """Hydra's flags, with the key=value overrides as `overrides`. Raises ConfigError."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        message = message.replace("unrecognized arguments", "unknown option")
        raise ConfigError(f"{message}; overrides are written key=value, see dpo-run --help")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(list(words))
    if args.experimental_rerun:
        raise ConfigError("--experimental-rerun: unpickles a file; use resume=<run folder>")
    if args.config_path:
        raise ConfigError("--config-path: would hide dpo-run's own YAML; use --config-dir")
    if args.config_dir:
        folder = Path(args.config_dir).absolute()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {args.config_dir}: no such folder")
        if any(word.startswith("hydra.searchpath=") for word in args.overrides):
            raise ConfigError("--config-dir and hydra.searchpath: give one of them")
        # As a setting it is recorded, and reaches the jobs of a sweep and a resumed run.
        args.overrides.append(as_override("hydra.searchpath", [f"file://{folder}"]))
    return args


def unparse_flags(args: Namespace) -> list[str]:
    """The command-line words of Hydra's flags, without those that dpo-run handles."""
    valued = {"--cfg": args.cfg, "--package": args.package, "--info": args.info}
    valued["--config-name"] = args.config_name
    switches = {"--resolve": args.resolve, "--hydra-help": args.hydra_help}
    switches |= {"--shell-completion": args.shell_completion, "--multirun": args.multirun}
    flags = [word for flag, value in valued.items() if value for word in (flag, value)]
    return flags + [flag for flag, is_set in switches.items() if is_set]
