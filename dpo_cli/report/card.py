"""README.md of a trained model, in the Hugging Face model card format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_cli.config import STAGES, title_of_stage
from dpo_cli.durable import encode, write_bytes
from dpo_cli.durable.provenance import load_provenance
from dpo_cli.durable.redact import redact
from dpo_cli.escapes import printable
from dpo_cli.losses import LOSSES
from dpo_cli.report.card_usage import usage
from dpo_cli.report.files import (
    command_line,
    short_path,
    to_yaml,
    without_home,
    without_paths,
)
from dpo_cli.report.numbers import before, figure, interval
from dpo_cli.report.page_figures import TILES, alt_of, shown_name, words_of
from dpo_cli.report.page_read import Folder, read_folder
from dpo_cli.report.page_samples import samples_of
from dpo_cli.report.page_story import BY_PREFERENCE
from dpo_cli.report.table import Column, Table, markdown_text

_DPO_PAPER = """\
@inproceedings{rafailov2023direct,
  title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author    = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning
               and Stefano Ermon and Chelsea Finn},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  url       = {https://arxiv.org/abs/2305.18290}
}
"""


CURVES = "training_curves.png"  # beside the weights, for the card
MAX_RESULTS = 10
MAX_SAMPLES = 3  # prompts


def write_model_card(folder: Path, facts: dict[str, Any], run_dir: Path | None = None) -> None:
    """Write README.md beside the weights in `folder`. Raises DiskError.

    facts (all but `stage` may be left out):
        stage: "sft", "dpo" or "reward"; name: title of the model; chat: whether prompts are chats
        adapter: whether the folder holds an adapter, whose own files name its base
        model, data: where they came from; of each `hub_id`, `revision`, `path` and `name`,
            and of the data whatever else describes it (`fingerprint`, `train_rows`, ...)
        command: the arguments of the command line, in a list
        config: the settings that matter, nested as in the YAML
        results: metric -> number; versions: package -> version
    run_dir: of the run that trained the model, for its curves (copied beside the card) and samples.

    The card is made to be published: no local path is in it (`without_paths`), no secret, and hub
    ids are in the metadata only where no local `path` was used instead.
    """
    facts = _as_saved(folder, facts)
    run = read_folder(run_dir) if run_dir else Folder(folder)
    run = replace(
        run, summary=facts.get("results") or {}, config={"stage": {"name": facts["stage"]}}
    )
    if curves := run.pictures.get("overview"):
        write_bytes(folder / CURVES, curves)
    clean = without_paths(without_home(redact({**facts, "results": {}})))
    write_bytes(folder / "README.md", encode(_front_matter(redact(facts)) + _body(clean, run)))


def _as_saved(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts, corrected from the saved files: an adapter's base, which may differ from `model`,
    and the reference; learning rates without floating-point noise."""
    config, model = facts.get("config") or {}, facts.get("model") or {}
    reference = load_provenance(folder).get("reference")
    if reference and "reference" in config.get("stage", {}):
        config = {**config, "stage": {**config["stage"], "reference": reference}}
    adapter = _read(folder / "adapter_config.json") if facts.get("adapter") else {}
    if base := adapter.get("base_model_name_or_path"):
        where = "path" if Path(base).is_absolute() else "hub_id"
        model = {where: base, "revision": adapter.get("revision")}
    return {**facts, "model": model, "config": _round_rates(config)}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _round_rates(config: Mapping[str, Any]) -> dict[str, Any]:
    """1e-5 for 9.999999999999999e-06."""
    return {
        key: _round_rates(value) if isinstance(value, Mapping)
        else float(f"{value:g}") if key.endswith("lr") and isinstance(value, float)
        else value
        for key, value in config.items()
    }  # fmt: skip


def _front_matter(facts: Mapping[str, Any]) -> str:
    """Metadata for the hub, which rejects a base model or dataset that is not a hub id."""
    base, data = _hub_id(facts.get("model")), _hub_id(facts.get("data"))
    fields = {
        "base_model": base,
        "datasets": [data] if data else None,
        "library_name": "peft" if facts.get("adapter") else "transformers",
        "pipeline_tag": (
            "text-classification" if facts["stage"] == "reward" else "text-generation"
        ),
        "tags": [facts["stage"], "dpo-run"],
        "generated_from": "dpo-run",
    }
    return f"---\n{to_yaml({key: value for key, value in fields.items() if value})}---\n\n"


def _hub_id(source: Mapping[str, Any] | None) -> str | None:
    return source.get("hub_id") if source and not source.get("path") else None


def _method(facts: Mapping[str, Any]) -> str:
    """How the model was trained: the text of its loss, otherwise of its stage."""
    stage, spec = facts["stage"], STAGES.get(facts["stage"])
    keys = (facts.get("config") or {}).get("stage") or {}
    if stage in BY_PREFERENCE and keys.get("loss") in LOSSES:
        return f"{'online ' * (stage == 'online-dpo')}{LOSSES[keys['loss']].method}"
    title = title_of_stage(str(stage), keys.get("advantage"))
    return (spec.method or title) if spec else title


def _body(facts: Mapping[str, Any], run: Folder) -> str:
    base = _origin(facts.get("model"))
    if facts.get("adapter"):
        base = f"An adapter (PEFT) of {base}"
    command = [*facts.get("command", ())]
    sections = [
        f"# {markdown_text(facts.get('name') or 'A model of dpo-run')}\n",
        f"{base} after {_method(facts)} on {_origin(facts.get('data'))}, trained with `dpo-run`.\n",
        "## Results\n\n" + _results(run),
        "## Usage\n\n" + _fenced(usage(facts), "python"),
        "## Samples\n\n" + _samples(run),
        "## Data\n\n" + _table(("", ""), facts.get("data")),
        "## Base model\n\n" + _table(("", ""), facts.get("model")),
        "## Training\n\n" + _training(command, facts.get("config")),
        "## Versions\n\n" + _table(("package", "version"), facts.get("versions")),
    ]
    if facts["stage"] in BY_PREFERENCE:
        sections.append("## Citation\n\n" + _fenced(_DPO_PAPER, "bibtex"))
    # only a heading: nothing is known for that section
    return "\n".join(section for section in sections if not section.endswith("\n\n"))


def _results(run: Folder) -> str:
    """The main figures, those with an interval first, and the curves."""
    rows = []
    for name in filter(None, (shown_name(run, metric) for metric in TILES)):
        value = figure(name, run.summary[name], run.summary.get(f"{name}_se"))
        first = before(name, run.summary).removesuffix(" before")
        rows.append([words_of(run, name), value, interval(name, run.summary), first])
    rows.sort(key=lambda row: not row[2])
    heads = (Column("Metric"), *(Column(h, True) for h in ("Value", "95% interval", "Before")))
    filled = [place for place in range(4) if any(row[place] for row in rows)]
    columns = [heads[place] for place in filled]
    cells = [[row[place] for place in filled] for row in rows[:MAX_RESULTS]]
    parts = [Table("", columns, cells).markdown()] if rows else []
    if "overview" in run.pictures:
        alt = markdown_text(without_paths(alt_of("overview", run)))
        parts.append(f"![{alt}]({CURVES})\n")
    return "\n".join(parts)


def _samples(run: Folder) -> str:
    """Completions of the first prompts: of the last step, or before and after training."""
    samples = samples_of(run)
    parts = []
    for sample in samples.rows[:MAX_SAMPLES] if samples else []:
        ends = (
            [sample.answers[0], sample.answers[-1]] if len(sample.answers) > 1 else sample.answers
        )
        parts.append("Prompt:\n\n" + _fenced(f"{sample.prompt.shown}\n", "text"))
        for answer in ends:
            name = markdown_text(answer.label or "Completion")
            parts.append(f"{name}:\n\n" + _fenced(f"{answer.completion.shown}\n", "text"))
    return "\n".join(parts)


def _origin(source: Mapping[str, Any] | None) -> str:
    """Name of a model or dataset: a hub id with its revision, or the last part of a path."""
    source = source or {}
    if hub_id := _hub_id(source):
        revision = source.get("revision")
        return markdown_text(f"{hub_id} (revision {revision})" if revision else hub_id)
    name = short_path(str(source["path"])) if source.get("path") else source.get("name")
    return markdown_text(name or "unnamed")


def _training(command: list[str], config: Mapping[str, Any] | None) -> str:
    parts = [_fenced(command_line(command) + "\n", "bash")] if command else []
    return "\n".join([*parts, *([_fenced(to_yaml(config), "yaml")] if config else [])])


def _table(heads: tuple[str, str], values: Mapping[str, Any] | None) -> str:
    rows = [[name, value] for name, value in (values or {}).items() if value is not None]
    return Table("", [*map(Column, heads)], rows).markdown() if rows else ""


def _fenced(text: str, language: str) -> str:
    text = printable(text)
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * max([3, *(length + 1 for length in runs)])
    return f"{fence}{language}\n{text}{fence}\n"
