"""data=mix: several datasets in one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dpo_cli.config.datasets import DATA_SCHEMAS, WRITING, DataConfig, MixDataConfig, row_terms
from dpo_cli.config.spelling import did_you_mean
from dpo_cli.errors import ConfigError

# Keys of one file, which a mix has none of.
OF_A_SOURCE = (
    "hub_id", "hub_config", "revision", "path", "eval_path", "train_split", "eval_split",
    "max_rows",
)  # fmt: skip
OF_THE_MIX = ("name", "eval_rows", *WRITING)


def sources_of(config: MixDataConfig) -> dict[str, tuple[DataConfig, float]]:
    """Name -> the source's configuration and share. ConfigError with every problem."""
    from dpo_cli.config.fit import fit  # it reads the table of DATA_SCHEMAS, which holds this one

    problems: list[str] = []
    found: dict[str, tuple[DataConfig, float]] = {}
    for name, given in config.sources.items():
        path = f"data.sources.{name}"
        values = dict(given) if isinstance(given, dict) else {}
        kind, share = values.pop("data", "jsonl"), values.pop("share", 1.0)
        if not isinstance(given, dict) or not given:
            problems.append(f"{path}={given}: expected keys such as {{path: pairs.jsonl}}")
        elif kind not in DATA_SCHEMAS or kind in ("mix", "sentiment"):
            hint = did_you_mean(str(kind), DATA_SCHEMAS)
            problems.append(f"{path}.data={kind}: no dataset that is read from files{hint}")
        elif isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 100:
            problems.append(f"{path}.share={share}: must be a number above 0, at most 100")
        elif shared := [each for each in OF_THE_MIX if each in values]:
            problems.append(f"{path}.{shared[0]}: is common to all sources; set data.{shared[0]}")
        else:
            own = fit(DATA_SCHEMAS[kind], values, path, {"data": kind}, problems)
            if own is not None:
                common = {each: getattr(config, each) for each in WRITING}
                found[name] = replace(own, eval_rows=None, **common), float(share)
    problems += [line for name, (own, _) in found.items() for line in _unreadable(name, own)]
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _unreadable(name: str, own: DataConfig) -> Iterator[str]:
    if not (own.path or own.hub_id):
        yield f"data.sources.{name}: no rows; give its path or hub_id"
    for term, column in row_terms(own).items():
        yield f"data.sources.{name}.{term}_field={column}: is not read with data=mix; remove it"
    for which in ("path", "eval_path"):
        value = getattr(own, which)
        if value and not Path(value).expanduser().exists() and "*" not in value:
            yield f"data.sources.{name}.{which}={value}: no such file or folder"


def mix_problems(config: DataConfig) -> Iterator[str]:
    if not isinstance(config, MixDataConfig):
        return
    if not config.sources:
        yield "data.sources={}: nothing to mix; give {a: {path: a.jsonl}, b: {path: b.jsonl}}"
    for name in OF_A_SOURCE:
        value = getattr(config, name)
        if value != getattr(MixDataConfig(), name):
            yield f"data.{name}={value}: has no effect with data=mix; set it in data.sources"
    try:
        sources_of(config)
    except ConfigError as error:
        yield from str(error).splitlines()
