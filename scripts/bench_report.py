"""What `bench.py` prints and keeps: tables, a Markdown file and a picture.

The Markdown file of a task, preset and device has one section for each set of conditions;
each section carries its record as JSON in a comment, from which file and picture are drawn
anew, so a repeated measurement replaces its own section alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bench_summary import json_line

Record = dict[str, Any]
KEPT = re.compile(r"^<!-- record: (\{.*\}) -->$", re.MULTILINE)
BLUE, GREY, INK = "#0072B2", "#9A9A9A", "#222222"
WORK = (
    "TFLOP/s and MFU are of the work that a step needs, the same for all sides: each prompt once, "
    "no padding, logits of response tokens alone, no gradient of frozen weights, and no reference "
    "in the loop; MFU is its share of the dense peak of the devices' datasheet."
)
RATIO_NAMES = {
    "ratio_vs_trl_best": "speed, ours / {peer} best",
    "memory_ratio_vs_trl_best": "peak memory, ours / {peer} best",
    "ratio_vs_trl_default": "speed, ours / {peer} default",
    "memory_ratio_vs_trl_default": "peak memory, ours / {peer} default",
    "ratio_live_vs_trl_best_live": "speed, reference in the loop on both sides, ours / best",
    "ratio_live_vs_trl_default": "speed, reference in the loop on both sides, ours / default",
    "ratio_one_epoch_vs_trl_best": "speed over one epoch with its reference pass, ours / best",
}


def keep(record: Record, folder: Path) -> Path:
    """Write or update `<task>[-<lora>]-<preset>-<device>.md` and `.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    lora = [record["lora"]["name"]] if record.get("lora") else []
    name = "-".join([record["task"], *lora, record["preset"], record["device"]])
    path = folder / f"{name}.md"
    old = KEPT.findall(path.read_text()) if path.is_file() else []
    records = {heading(r): r for r in map(json.loads, old)} | {heading(record): record}
    drawn = find_spec("matplotlib") is not None
    path.write_text(markdown(path.stem, list(records.values()), drawn))
    if drawn:
        draw(path.with_suffix(".png"), list(records.values()))
    return path


def heading(record: Record) -> str:
    """The conditions that make two measurements comparable."""
    settings, data = record["settings"], record["data"]["label"]
    trl = f", TRL {record['versions'].get('trl')}"
    if record["task"] == "decode":
        trl = ""
    elif record.get("peer_missing"):  # a section of its own: it replaces no comparison
        trl = ", without TRL"
    rank = f"LoRA rank {record['lora']['r']}, " if record.get("lora") else ""
    many = f", {settings['devices']} devices" if settings.get("devices", 1) > 1 else ""
    plural = "" if settings["threads"] == 1 else "s"
    threads = f", {settings['threads']} thread{plural}" if record["device"] == "cpu" else ""
    return f"{rank}{record['precision']}, batch {settings['batch']}, {data}{many}{threads}{trl}"


def markdown(name: str, records: Sequence[Record], drawn: bool = True) -> str:
    picture = [f"![{name}]({name}.png)", ""] if drawn else []
    lines = [f"# {name}", "", *picture,
             "Medians over the rounds, lowest and highest in brackets. Written by "
             "`scripts/bench.py`.", ""]  # fmt: skip
    for record in records:
        lines += [f"## {heading(record)}", "", *section(record), ""]
        lines += [f"<!-- record: {json_line(record)} -->", ""]
    return "\n".join(lines)


def section(record: Record) -> list[str]:
    machine, settings = record["machine"], record["settings"]
    versions = listed(record["versions"])
    for name, others in record.get("other_versions", {}).items():
        versions += f"; {name}: {listed(others)}"
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    facts = [
        f"`{record['command']}`",
        f"{record['date']}, commit {record['commit']}, {where}, {machine['system']}; {versions}.",
        f"{settings['rounds']} rounds of {settings['steps']} steps after {settings['warmup']} to "
        f"warm up, every side in a process of its own. {compared(record)}",
        "Settings: " + "; ".join(f"{name}: `{facts['settings'] or 'defaults'}`"
                                 for name, facts in record["sides"].items()) + ".",
        *(f"**{one['name']} failed: {one['why']}.** Its settings: "
          f"`{one['settings'] or 'defaults'}`." for one in record.get("failed", [])),
    ]  # fmt: skip
    if (ours := record["sides"].get("ours", {})).get("attention"):
        facts.append(f"dpo-run: attention={ours['attention']}, at most "
                     f"{ours['micro_batch_tokens']:,} tokens a micro-batch.")  # fmt: skip
    if any("tflops_per_second" in side for side in record["sides"].values()):
        facts.append(WORK)
    if settings.get("devices", 1) > 1:
        facts.append("Peak memory is that of the device that needs most.")
    if machine["others_cpu"] > 0.1:
        facts.append(f"**Other processes kept up to {machine['others_cpu']:.1f} cores busy.**")
    paragraphs = [line for fact in facts for line in (fact, "")]
    steps = [line for rows in step_tables(record) for line in (*table(rows), "")]
    folded = ["<details><summary>What the sides logged in each step</summary>", "", *steps]
    tables = [*table(side_rows(record)), ""]
    if record["ratios"]:
        tables += [*table(ratio_rows(record)), ""]
    if record["searched"]:
        tables += ["Settings tried, one process each:", "", *table(search_rows(record)), ""]
    return [*tables, *paragraphs, *folded, "</details>"]


def listed(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items() if number)


def compared(record: Record) -> str:
    if record.get("peer_missing"):
        return f"**{record['peer_missing']}: dpo-run alone, compared with nothing.**"
    allowed = record["losses_agree"]["allowed"]
    limits = (
        f"Losses may differ by {allowed['loss']:g}, log-probabilities by "
        f"{allowed['logps_relative']:g} of their value."
    )
    if not record["losses_agree"]["agree"]:
        return f"{limits} **A side differs by more: its figures are left out.**"
    return f"{limits} Both sides logged the same in every step: {agreed(record)}."


def agreed(record: Record) -> str:
    """How closely the figures that both sides logged agree."""
    found = record["losses_agree"]
    names = next(iter(record["sides"].values()))["figures_by_step"]
    parts = {
        "losses": ("loss", f"{found['largest_loss_difference']:.1e}"),
        "margins of the rewards": ("rewards/", f"{found['largest_loss_difference']:.1e}"),
        "log-probabilities": (
            "logps/", f"{found['largest_relative_logps_difference']:.1e} of their value"
        ),
    }  # fmt: skip
    return ", ".join(
        f"{what} within {limit}"
        for what, (start, limit) in parts.items()
        if any(name.startswith(start) for name in names)
    )


def side_rows(record: Record) -> list[list[str]]:
    tokens = record["data"].get("real_tokens_per_row")
    rows = [["side", f"{record['unit']}/s", "real tokens/s", "TFLOP/s", "MFU", "peak memory, MB",
             "reference pass / epoch", f"{record['unit']}/s over one epoch", "startup, s",
             "failed"]]  # fmt: skip
    for name, side in record["sides"].items():
        share, epoch = side.get("reference_share_of_epoch"), side.get("per_second_one_epoch")
        real = f"{side['per_second']['median'] * tokens:,.0f}" if tokens else ""
        rows.append([
            name, ranged(side["per_second"]), real,
            *(ranged(side[key]) if key in side else "" for key in ("tflops_per_second", "mfu")),
            ranged(side["peak_memory_mb"]), ranged(share) if share else "",
            ranged(epoch) if epoch else "",
            ranged(side["startup_seconds"]) if "startup_seconds" in side else "", "",
        ])  # fmt: skip
    for one in record.get("failed", []):
        rows.append([one["name"], *[""] * (len(rows[0]) - 2), one["why"].replace("|", "\\|")])
    filled = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in filled] for row in rows]


def ratio_rows(record: Record) -> list[list[str]]:
    peer = "generate" if record["task"] == "decode" else "TRL"
    best = record.get("roles", {}).get("best", "")
    peer += "" if best.endswith("-best") or not best else f" ({best})"
    named = [(ratio_name(key, peer), value) for key, value in record["ratios"].items()]
    return [["ratio", "median [range]"], *([name, ranged(value)] for name, value in named)]


def ratio_name(key: str, peer: str) -> str:
    """Of a variant of ours, where it is none of the usual ones."""
    variant = key.removeprefix("ratio_").removesuffix("_vs_trl_best")
    return RATIO_NAMES.get(key, f"speed, {variant} / {{peer}} best").format(peer=peer)


def search_rows(record: Record) -> list[list[str]]:
    rows = [["settings", f"{record['unit']}/s", "peak memory, MB", "same losses"]]
    for tried in record["searched"]:
        if tried.get("failed"):
            rows.append([tried["name"], "", "", "failed"])
            continue
        figures = (short(tried[key]) for key in ("per_second", "peak_memory_mb"))
        rows.append([tried["name"], *figures, "yes" if tried["agrees"] else "no"])
    return rows


def ranged(value: Mapping[str, float]) -> str:
    middle, low, high = (short(value[key]) for key in ("median", "min", "max"))
    return middle if low == high else f"{middle} [{low}, {high}]"


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, columns aligned, so that it can be read on a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def step_tables(record: Record, failed: bool = False) -> list[list[list[str]]]:
    """What every side logged in each step, side by side; a table for each figure. failed: also of
    those that compute something else."""
    sides = dict(record["sides"])
    if failed:
        sides |= {one["name"]: one for one in record["failed"] if one["figures_by_step"]}
    if not sides:
        return []
    names = next(iter(sides.values()))["figures_by_step"]
    return [
        [
            [name, *sides],
            *([str(step), *(f"{value:.6g}" for value in values)]
              for step, values in enumerate(columns_of(sides, name), start=1)),
        ]
        for name in names
    ]  # fmt: skip


def columns_of(sides: Mapping[str, Any], name: str) -> list[tuple[float, ...]]:
    columns = [facts["figures_by_step"].get(name, []) for facts in sides.values()]
    return list(zip_longest(*columns, fillvalue=float("nan")))


def draw(path: Path, records: Sequence[Record]) -> None:
    """Bars of speed and peak memory, a row of two panels a section; whiskers: lowest, highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 0.6 + 2.4 * len(records)), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(records), 2, squeeze=False)
    for row, record in zip(panels, records, strict=True):
        unit = record["unit"]
        bars(row[0], record, "per_second", f"{unit}/s (more is better)")
        bars(row[1], record, "peak_memory_mb", "peak memory, MB (less is better)")
        row[0].set_title(heading(record), loc="left", fontsize=9, color=INK)
    figure.tight_layout(h_pad=1.5)
    figure.savefig(path)


def bars(
    axes: Any, record: Record, key: str, label: str, colours: Sequence[str] | None = None
) -> None:
    """One bar a side. colours: of the sides; by default ours are blue."""
    sides = record["sides"]
    values = [side[key] for side in sides.values()]
    middle = [v["median"] for v in values]
    whiskers = [[v["median"] - v["min"] for v in values], [v["max"] - v["median"] for v in values]]
    colours = colours or [BLUE if name.startswith("ours") else GREY for name in sides]
    axes.barh(list(sides), middle, color=colours, xerr=whiskers, ecolor=INK, capsize=2)
    for place, value in enumerate(values):
        label_at, text = value["max"], f"  {short(value['median'])}"
        axes.text(label_at, place, text, va="center", fontsize=8, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(v["max"] for v in values))
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
