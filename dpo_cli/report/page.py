"""report.html: a run on one self-contained page, without network access or scripts.

The template engine escapes every text from outside (samples, names, settings), control characters
included; the page's policy forbids everything but its own style and pictures.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dpo_cli.durable import encode, write_bytes
from dpo_cli.escapes import printable
from dpo_cli.report.page_figures import pictures_of, tiles_of
from dpo_cli.report.page_read import Folder, cleaned, read_folder
from dpo_cli.report.page_samples import samples_of
from dpo_cli.report.page_story import title_of, verdict_of
from dpo_cli.report.page_tables import facts, points, sweep, win_rates

REPORT = "report.html"
_POLICY = (
    "default-src 'none'; img-src data:; style-src {style}; base-uri 'none'; form-action 'none'"
)


def write_run_report(run_dir: Path, data: Mapping[str, Any]) -> Path:
    """Write `report.html` of a finished run; returns its path. Raises DiskError.

    data: facts of the rows it was trained on (`train_rows`, `eval_rows`, `fingerprint`, ...).
    """
    folder = read_folder(run_dir)
    body = {"run": run_parts(folder, cleaned(dict(data))), "kicker": str(cleaned(str(run_dir)))}
    return write_page(run_dir, "run.html.j2", title_of(folder), body)


def run_parts(folder: Folder, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the templates show of a run.

    data: see `write_run_report`.
    """
    data = data or {}
    tables = [*folder.tables, win_rates(folder), points(folder), sweep(folder)]
    figures = {k: v for k, v in folder.summary.items() if k not in ("stage", "run_dir")}
    return {
        "verdict": verdict_of(folder, data),
        "tiles": tiles_of(folder),
        "pictures": pictures_of(folder),
        "tables": [table for table in tables if table is not None],
        "samples": samples_of(folder),
        "commands": folder.commands,
        "config": folder.config_text,
        "data": facts("Rows of this run", ("fact", "value"), data),
        "figures": facts("summary.json", ("metric", "value"), figures),
        "versions": facts("versions.json", ("package", "version"), folder.versions),
    }


def write_page(run_dir: Path, template: str, title: str, body: Mapping[str, Any]) -> Path:
    """Render a template of `templates/` into `report.html`. Raises DiskError."""
    path = run_dir / REPORT
    write_bytes(path, encode(render(template, title, body)))
    return path


def render(template: str, title: str, body: Mapping[str, Any]) -> str:
    environment = _environment()
    assert environment.loader is not None
    style, _, _ = environment.loader.get_source(environment, "style.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    return environment.get_template(template).render(
        title=title,
        policy=_POLICY.format(style=f"'sha256-{digest}'"),
        style=Markup(style),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **body,
    )


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("dpo_cli.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _visible(value: Any) -> Any:
    """Text with its control characters escaped, as on the console."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
