"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from scripts.bench import page
from scripts.bench.page import Page, Rows
from scripts.bench.summary import Record

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


def name_of(record: Record) -> str:
    """The page's name, `<task>[-<lora>]-<preset>-<device>`."""
    lora = [record["lora"]["name"]] if record.get("lora") else []
    return "-".join([record["task"], *lora, record["preset"], record["device"]])


def heading(record: Record) -> str:
    settings, data = record["settings"], record["data"]["label"]
    trl = f", TRL {record['versions'].get('trl')}"
    if record["task"] == "decode":
        trl = ""
    elif record.get("peer_missing"):  # a separate section, which replaces no comparison
        trl = ", without TRL"
    rank = f"LoRA rank {record['lora']['r']}, " if record.get("lora") else ""
    many = f", {settings['devices']} devices" if settings.get("devices", 1) > 1 else ""
    return (f"{rank}{record['precision']}, batch {settings['batch']}, {data}{many}"
            f"{page.threads_of(record)}{trl}")  # fmt: skip


def section(record: Record) -> list[str]:
    facts = [
        f"{page.rounds_line(record)} {compared(record)}",
        "Settings: " + "; ".join(f"{name}: `{facts['settings'] or 'defaults'}`"
                                 for name, facts in record["sides"].items()) + ".",
        *(f"**{one['name']} failed: {one['why']}.** Its settings: "
          f"`{one['settings'] or 'defaults'}`." for one in record.get("failed", [])),
    ]  # fmt: skip
    if (ours := record["sides"].get("ours", {})).get("attention"):
        facts.append(f"dpo-run: attention={ours['attention']}, at most "
                     f"{ours['micro_batch_tokens']:,} tokens per micro-batch.")  # fmt: skip
    if any("tflops_per_second" in side for side in record["sides"].values()):
        facts.append(WORK)
    if record["settings"].get("devices", 1) > 1:
        facts.append("Peak memory is the maximum over the devices.")
    paragraphs = [line for fact in facts for line in (fact, "")]
    steps = [line for rows in step_tables(record) for line in (*page.table(rows), "")]
    folded = ["<details><summary>What the sides logged in each step</summary>", "", *steps]
    tables = [*page.table(side_rows(record)), ""]
    if record["ratios"]:
        tables += [*page.table(ratio_rows(record)), ""]
    if record["searched"]:
        tables += ["Settings tried, one process each:", "", *page.table(search_rows(record)), ""]
    return [*tables, *page.where_and_when(record), *paragraphs, *folded, "</details>", ""]


def compared(record: Record) -> str:
    """Tolerances, and the differences between the sides."""
    if record.get("peer_missing"):
        return f"**{record['peer_missing']}: dpo-run only, without a comparison.**"
    agreement_record = record["losses_agree"]
    limits = (f"Losses may differ by {agreement_record['allowed']['loss']:g}, log-probabilities by "
              f"{agreement_record['allowed']['logps_relative']:g} of their value.")  # fmt: skip
    if not agreement_record["agree"]:
        return f"{limits} **A side differs by more: its figures are left out.**"
    loss = f"within {agreement_record['largest_loss_difference']:.1e}"
    logps = f"within {agreement_record['largest_relative_logps_difference']:.1e} of their value"
    parts = {"loss": f"losses {loss}", "rewards/": f"margins of the rewards {loss}",
             "logps/": f"log-probabilities {logps}"}  # fmt: skip
    logged = next(iter(record["sides"].values()))["figures_by_step"]
    agreed = ", ".join(text for start, text in parts.items()
                       if any(name.startswith(start) for name in logged))  # fmt: skip
    return f"{limits} Both sides logged the same in every step: {agreed}."


def side_rows(record: Record) -> Rows:
    """One row per side; only columns with values."""
    unit, tokens = record["unit"], record["data"].get("real_tokens_per_row")
    columns = {  # of a side's facts
        f"{unit}/s": "per_second", "real tokens/s": "", "TFLOP/s": "tflops_per_second",
        "MFU": "mfu", "peak memory, MB": "peak_memory_mb",
        "reference pass / epoch": "reference_share_of_epoch",
        f"{unit}/s over one epoch": "per_second_one_epoch", "startup, s": "startup_seconds",
    }  # fmt: skip
    rows = [["side", *columns, "failed"]]
    for name, side in record["sides"].items():
        row = [page.ranged(side[key]) if key in side else "" for key in columns.values()]
        if tokens:
            row[1] = f"{side['per_second']['median'] * tokens:,.0f}"
        rows.append([name, *row, ""])
    for one in record.get("failed", []):
        rows.append([one["name"], *[""] * len(columns), one["why"].replace("|", "\\|")])
    filled = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in filled] for row in rows]


def ratio_rows(record: Record) -> Rows:
    peer = "generate" if record["task"] == "decode" else "TRL"
    best = record.get("roles", {}).get("best", "")
    peer += "" if best.endswith("-best") or not best else f" ({best})"
    values = [(ratio_name(key, peer), value) for key, value in record["ratios"].items()]
    return [["ratio", "median [range]"], *([name, page.ranged(value)] for name, value in values)]


def ratio_name(key: str, peer: str) -> str:
    """Name of a variant of ours; empty for the usual sides."""
    variant = key.removeprefix("ratio_").removesuffix("_vs_trl_best")
    return RATIO_NAMES.get(key, f"speed, {variant} / {{peer}} best").format(peer=peer)


def search_rows(record: Record) -> Rows:
    rows = [["settings", f"{record['unit']}/s", "peak memory, MB", "same losses"]]
    for tried in record["searched"]:
        if tried.get("failed"):
            rows.append([tried["name"], "", "", "failed"])
            continue
        figures = (page.short(tried[key]) for key in ("per_second", "peak_memory_mb"))
        rows.append([tried["name"], *figures, "yes" if tried["agrees"] else "no"])
    return rows


def step_tables(record: Record, failed: bool = False) -> list[Rows]:
    """The logged figures of every side, side by side; one table per figure. failed: also those of
    sides that compute something else."""
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


def draw(axes: Any, record: Record) -> None:
    """Plot speed and peak memory; our sides are blue."""
    labels = {"per_second": f"{record['unit']}/s (more is better)",
              "peak_memory_mb": "peak memory, MB (less is better)"}  # fmt: skip
    sides = record["sides"]
    colors = [page.BLUE if name.startswith("ours") else page.GREY for name in sides]
    for panel, (key, label) in zip(axes, labels.items(), strict=True):
        page.bars(panel, {name: side[key] for name, side in sides.items()}, label, colors)


PAGE = Page(f"{page.MEDIANS} Written by `scripts/bench.py`.", heading, section, draw)
