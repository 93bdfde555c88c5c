"""Curves: what is read, how it is smoothed, and that every label can be read."""

import json
import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from dpo_cli.report import plots
from dpo_cli.report.curves import read_curves, running_mean
from dpo_cli.report.plots import draw_curves, short_number

SINGLE = (1050, 630)  # pixels of a single chart


def metrics(run_dir, rows):
    run_dir.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(text)
    return run_dir


def dpo_rows(steps):
    noise = np.random.default_rng(0).normal(size=(steps + 1, 3))
    for step in range(1, steps + 1):
        margin, (a, b, c) = 3 * step / steps, noise[step]
        yield {"step": step, "time": "t", "loss": math.log1p(math.exp(-margin)) + 0.05 * a,
               "lr": 1e-6, "grad_norm": abs(b) + 1, "tokens_per_second": 3000 + 100 * c,
               "rewards/chosen": 0.1 * a - margin / 2, "rewards/rejected": 0.1 * b - 1.5 * margin,
               "rewards/margins": margin + 0.1 * c, "rewards/accuracies": 0.5 + margin / 8,
               "logps/chosen": -120 + 3 * a, "logps/rejected": -120.5 + 3 * b,
               "logratios/chosen": a, "logratios/rejected": b}  # fmt: skip
        if step % max(1, steps // 10) == 0:
            yield {"step": step, "eval/loss": math.log1p(math.exp(-margin)),
                   "eval/rewards/accuracies": 0.5 + margin / 8, "eval/rewards/margins": margin,
                   "eval/rewards/chosen": -margin / 2, "eval/logps/chosen": -120}  # fmt: skip


def test_curves_are_read_by_step(tmp_path):
    rows = [
        {"step": 2, "loss": 0.5, "eval/loss": 0.6, "note": "text"},
        {"step": 1, "loss": None},
        {"step": 2, "loss": 0.4},  # repeated after a resume
    ]
    metrics(tmp_path, rows)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('[1]\n{"loss": 3}\n{"step": 3, "lo')
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert set(curves) == {"loss", "eval/loss"}
    steps, values = curves["loss"]
    assert steps.tolist() == [1, 2]
    np.testing.assert_array_equal(values, [math.nan, 0.4])
    assert read_curves(tmp_path / "absent.jsonl") == {}


@pytest.mark.parametrize(("points", "window"), [(1, 1), (7, 3), (50, 5), (50, 6), (5, 99)])
def test_running_mean_against_a_plain_loop(points, window):
    rng = np.random.default_rng(points)
    values = rng.normal(size=points)
    values[rng.random(points) < 0.2] = np.nan
    half = window // 2
    expected = [
        np.nan if np.isnan(v) else np.nanmean(values[max(i - half, 0) : i + half + 1])
        for i, v in enumerate(values)
    ]
    np.testing.assert_allclose(running_mean(values, window), expected, rtol=1e-12)


def test_a_dpo_run_gets_every_chart(tmp_path):
    written = draw_curves(metrics(tmp_path / "run", dpo_rows(60)))
    names = ["overview", "overview_narrow", "loss", "accuracy", "margins", "rewards", "logratios",
             "logps", "grad_norm", "lr", "throughput"]  # fmt: skip
    assert written == [tmp_path / "run" / "plots" / f"{name}.png" for name in names]
    for path in written:
        image = imread(path)
        assert image[..., :3].min() < 0.4  # something dark was drawn
        if not path.stem.startswith("overview"):
            assert (image.shape[1], image.shape[0]) == SINGLE
    assert sorted(written) == sorted((tmp_path / "run" / "plots").iterdir())


def test_a_held_out_objective_has_a_chart_of_its_own(tmp_path, monkeypatch):
    """Of a run that scores samples; beside the training loss it would be compared with it."""
    drawn = {}
    single = plots._single
    monkeypatch.setattr(plots, "_single", lambda panel, curves, name: drawn.update(
        {panel.name: {n for line in panel.lines for n in (line[0], f"eval/{line[0]}")
                      if n in curves}}) or single(panel, curves, name))  # fmt: skip
    rows = [{"step": s, "loss": 0.7, "score": 0.5, "eval/loss": -0.5, "eval/score": 0.5}
            for s in range(1, 5)]  # fmt: skip
    draw_curves(metrics(tmp_path, rows))
    assert drawn["loss"] == {"loss"}
    assert drawn["objective"] == {"eval/objective"}
    assert drawn["score"] == {"score", "eval/score"}


def test_an_sft_run_gets_its_charts_only(tmp_path):
    rows = [{"step": s, "loss": 3 / s, "lr": 1e-5, "grad_norm": 1.0} for s in range(1, 9)]
    written = draw_curves(metrics(tmp_path, rows))
    assert [path.stem for path in written] == [
        "overview", "overview_narrow", "loss", "grad_norm", "lr"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rows", [None, [], [{"step": 1, "loss": None}], [{"step": 1, "custom": 1.0}]]
)
def test_nothing_to_draw_writes_nothing(tmp_path, rows):
    if rows is not None:
        metrics(tmp_path, rows)
    before = list(tmp_path.iterdir())
    assert draw_curves(tmp_path) == []
    assert list(tmp_path.iterdir()) == before


@pytest.fixture
def figures(monkeypatch):
    """The figures laid out, by file name; none is saved."""
    drawn = {}

    def keep(figure, path):
        figure.draw_without_rendering()
        drawn[path.stem] = figure
        return path

    monkeypatch.setattr(plots, "save_png", keep)
    return drawn


@pytest.mark.parametrize(
    "rows",
    [
        list(dpo_rows(1)),
        list(dpo_rows(12)),
        list(dpo_rows(400)),
        [{"step": s, "loss": -0.0123456 - s * 1e-7, "eval/loss": 2.0} for s in range(99)],
    ],
    ids=len,
)
def test_no_text_overlaps_another_or_leaves_the_picture(tmp_path, figures, rows):
    draw_curves(metrics(tmp_path / ("a-long-name-of-a-run_" * 9), rows))
    for figure in figures.values():
        texts = [*figure.texts, *(t for axes in figure.axes for t in visible_texts(axes))]
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
        for text, box in boxes:
            assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, text
            assert 0 <= box.y0 < box.y1 <= figure.bbox.y1, text
        for (one, box), (other, other_box) in combinations(boxes, 2):
            assert not box.overlaps(other_box), (one, other)


def test_a_narrow_overview_has_one_column(tmp_path, figures):
    draw_curves(metrics(tmp_path, dpo_rows(12)))
    wide, narrow = figures["overview"], figures["overview_narrow"]
    titles = [[axes._left_title.get_text() for axes in f.axes] for f in (wide, narrow)]
    assert titles[0] == titles[1]
    assert len({axes.get_position().x0 for axes in narrow.axes}) == 1
    assert narrow.get_size_inches()[0] == plots.PHONE


def test_rounding_is_not_drawn_as_a_curve(tmp_path, figures):
    rows = [{"step": s, "loss": 0.1 * (1 + 1e-7 * (-1) ** s)} for s in range(1, 50)]
    draw_curves(metrics(tmp_path, rows))
    low, high = figures["loss"].axes[0].get_ylim()
    assert high - low > 0.01
    assert low < 0.1 < high


def visible_texts(axes):
    ticks = [axis.get_major_ticks() for axis in (axes.xaxis, axes.yaxis)]
    inside = [
        tick.label1
        for axis_ticks, limits in zip(ticks, (axes.get_xlim(), axes.get_ylim()), strict=True)
        for tick in axis_ticks
        if limits[0] <= tick.get_loc() <= limits[1]
    ]
    titles = [axes.title, axes._left_title]
    return [text for text in [*axes.texts, *inside, *titles] if text.get_text()]


def test_labels_stand_at_the_ends_of_their_lines(tmp_path, figures):
    rows = [{"step": s, "logps/chosen": -100.0 - s, "logps/rejected": -100.0 - 3 * s}
            for s in range(1, 31)]  # fmt: skip
    draw_curves(metrics(tmp_path, rows))
    (axes,) = figures["logps"].axes
    low, high = axes.get_ylim()
    places = {text.get_text(): text.xy[1] * (high - low) + low for text in axes.texts}
    assert places == pytest.approx({"chosen": -130, "rejected": -190})


def test_a_point_between_gaps_is_drawn(tmp_path, figures):
    values = [1.0, None, 2.0, None, 3.0, 4.0]
    draw_curves(metrics(tmp_path, [{"step": i, "loss": v} for i, v in enumerate(values)]))
    (axes,) = figures["loss"].axes
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert dots[0].get_xydata().tolist() == [[0, 1], [2, 2]]


def test_a_name_with_dollars_is_no_formula(tmp_path):
    assert draw_curves(metrics(tmp_path / r"a$\frac{$b", dpo_rows(3)))


def test_no_global_state_of_matplotlib_is_touched(tmp_path):
    metrics(tmp_path, dpo_rows(3))
    code = (
        "import sys, pathlib, matplotlib; before = dict(matplotlib.rcParams);"
        "from dpo_cli.report.plots import draw_curves;"
        "draw_curves(pathlib.Path(sys.argv[1]));"
        "assert 'matplotlib.pyplot' not in sys.modules;"
        "assert dict(matplotlib.rcParams) == before"
    )
    checkout = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=checkout)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (-1.5, "-1.5"), (1500, "1.5k"), (-2e6, "-2M"), (1e-4, "1e-4"),
     (2.5e-5, "2.5e-5"), (2.0000000000000003e-6, "2e-6"), (0.30000000000000004, "0.3")],
)  # fmt: skip
def test_short_number(value, text):
    assert short_number(value) == text.replace("-", "\N{MINUS SIGN}")
