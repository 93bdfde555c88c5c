"""stage=frontier on evaluations written by hand: tables, csv, picture, refusals."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from dpo_cli.errors import ConfigError, DataError
from dpo_cli.evaluation.methods import budgets, leads, mean_curve, summarize, within
from dpo_cli.evaluation.points import measured_once
from dpo_cli.evaluation.policies import POINT_KEYS
from dpo_cli.report import frontier as picture
from dpo_cli.report.console import Progress
from dpo_cli.report.frontier import Cloud, _caption, kl_limit, styles
from dpo_cli.run import run
from dpo_cli.session.preview import Preview
from dpo_cli.stages.frontier import COLUMNS, cloud, plan, verdicts
from dpo_cli.train.runtime import Runtime
from small_runs import configure


def row(method, kl, reward, seed=0, **known):
    shared = {"setting": "", "seed": seed, "reward_se": 0.01, "kl_se": 0.1}
    return {
        **dict.fromkeys(POINT_KEYS), **shared, "method": method, "kl": kl, "reward": reward, **known
    }  # fmt: skip


def evaluation(folder, rows, reward_fn="sentiment", max_new_tokens=48):
    folder.mkdir(parents=True)
    (folder / "points.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "config.yaml").write_text(
        f"reward_fn: {{name: {reward_fn}}}\nstage: {{max_new_tokens: {max_new_tokens}}}\n"
    )
    return folder


def points(seed):
    """Two methods, an optimum that is sqrt(KL) / 2 up to 4 nats, best-of-n on it."""
    off = 0.02 * seed
    return [
        row("best-of-n", 0.0, 0.0, seed, setting="n=1", kl_se=None),
        row("best-of-n", math.log(4) - 0.75, 0.35, seed, setting="n=4", kl_se=None),
        *(row("optimum", k, math.sqrt(k) / 2 + off, seed, setting="beta=1") for k in (0.25, 1, 4)),
        row("dpo", 1.0, 0.4 + off, seed, setting="beta=0.5", step=50, shortfall=0.1,
            gradient_steps=50),
        row("dpo", 1.5, 0.5 + off, seed, setting="beta=0.5", step=100, shortfall=0.2,
            gradient_steps=100),
        row("ppo-baseline", 1.8, 0.3 + off, seed, step=300, shortfall=0.4, gradient_steps=300,
            samples=4096),
        row("ppo-baseline", 9.0, 0.8, seed, step=600, shortfall=0.2, beyond_optimum=True,
            gradient_steps=600, samples=8192),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    home = tmp_path_factory.mktemp("frontier")
    folders = [evaluation(home / str(seed), points(seed)) for seed in (0, 1)]
    words = ("stage=frontier", "logger.progress=off", f"run_dir={home}/out")
    chosen = f"stage.evaluations=[{folders[0]},{folders[1]},{folders[0]}]"  # one of them twice
    summary = run(configure(*words, chosen), ["dpo-run"])
    return home / "out", summary


def test_the_csv_has_every_point_once(drawn):
    with (drawn[0] / "frontier.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == 2 * len(points(0))
    last = rows[-1]
    assert (last["method"], last["seed"], last["step"]) == ("ppo-baseline", "1", "600")
    assert (float(last["kl"]), float(last["reward"])) == (9.0, 0.8)
    assert last["beyond_optimum"] == "True"
    assert rows[0]["shortfall"] == ""


def test_the_summary_says_how_far_from_the_optimum_and_at_what_cost(drawn):
    summary = drawn[1]
    assert summary["dpo/mean_shortfall"] == pytest.approx(0.15)
    assert summary["dpo/best_reward"] == pytest.approx(0.52)
    assert summary["dpo/best_kl"] == 1.5
    assert summary["dpo/best_setting"] == "beta=0.5"
    assert summary["dpo/gradient_steps"] == 100
    assert "dpo/samples" not in summary
    assert summary["ppo-baseline/samples"] == 8192
    assert not any(name.startswith("optimum/") for name in summary)


def test_the_tables_by_hand(drawn):
    """Budgets 2, 5, 10: dpo's best up to 2 nats is .50 and .52, ppo's .30 and .32."""
    text = (drawn[0] / "frontier.md").read_text()
    assert "| method | KL≤2 | KL≤5 | KL≤10 | best (at KL) |" in text
    assert "| dpo | 0.510±0.010 | 0.510±0.010 | 0.510±0.010 | 0.520 (1.50) |" in text
    assert "| ppo-baseline | 0.310±0.010 | 0.310±0.010 | 0.800±0.000 | 0.800 (9.00) |" in text
    optimum = next(line for line in text.splitlines() if line.startswith("| optimum"))
    within_2 = (0.5 + (math.sqrt(2) - 1) * 0.5) + 0.01  # linear in sqrt(KL), mean of the seeds
    assert optimum == f"| optimum | {within_2:.3f} | - | - | - |"
    assert "Up to a KL of 2: dpo leads ppo-baseline, by 0.200 ± 0.014." in text
    assert "Up to a KL of 10: ppo-baseline leads dpo, by 0.290 ± 0.010." in text
    assert "| dpo | 4 | 2 | 1.00-1.50 | 0.150 | 0.200 | - | 100 |" in text
    assert "| ppo-baseline | 4 | 2 | 1.80-9.00 | ≥0.300 | ≥0.400 | 8,192 | 600 |" in text


def test_the_picture_shows_every_method_and_the_optimum(drawn):
    for name in ("frontier", "frontier_narrow"):
        check_colours(imread(drawn[0] / "plots" / f"{name}.png")[..., :3])


@pytest.mark.parametrize("methods", [1, 8])
def test_a_narrow_picture_holds_its_legend(tmp_path, monkeypatch, methods):
    figures = []
    monkeypatch.setattr(picture, "save_png", lambda figure, path: figures.append(figure) or path)
    one, names = np.ones(1), [f"a-method-of-mine-{n}" for n in range(methods)]
    clouds = [picture.Cloud(n, one, one, one, one, np.array([True])) for n in names]
    best_of = picture.Cloud("best-of-n", one, one, one, one, np.array([True]), ("1",))
    run_dir = tmp_path / ("run" * 60)
    run_dir.mkdir()
    picture.draw_frontier(run_dir, clouds, best_of, None)
    for figure in figures:
        figure.draw_without_rendering()
        (axes,) = figure.axes
        legend = axes.get_legend()
        assert [t.get_text() for t in legend.get_texts()][:methods] == names
        below = min(box.y0 for box in (t.get_window_extent() for t in legend.get_texts()))
        footer = next(t for t in figure.texts if t.get_text().startswith("runrun"))
        for text in [*figure.texts, *legend.get_texts(), axes.xaxis.label, axes.yaxis.label]:
            box = text.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, text
            assert 0 <= box.y0 < box.y1 <= figure.bbox.y1, text
        assert below > footer.get_window_extent().y1
        assert not any(
            t.get_window_extent().overlaps(axes.xaxis.label.get_window_extent())
            for t in legend.get_texts()
        )


def check_colours(image):
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (np.abs(image * 255 - colour).max(-1) < 4).sum() > 100
    assert (np.abs(image * 255 - 0x22).max(-1) < 4).sum() > 500  # the line, diamonds, the title


def test_the_tables_fit_a_terminal(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(Progress, "show", lambda self, table: shown.append(table))
    folder = evaluation(tmp_path / "e", points(0))
    words = f"stage.evaluations=[{folder}]", f"run_dir={tmp_path}/out", "logger.plots=false"
    run(configure("stage=frontier", *words), ["dpo-run"])
    assert len(shown) == 3
    assert all(Console(width=200).measure(table).minimum <= 80 for table in shown)


def test_other_rewards_and_lengths_are_refused(tmp_path):
    first = evaluation(tmp_path / "a", points(0))
    other = evaluation(tmp_path / "b", points(0), reward_fn="length")
    longer = evaluation(tmp_path / "c", points(0), max_new_tokens=64)
    for folder, key in ((other, "reward_fn"), (longer, r"stage\.max_new_tokens")):
        config = configure(
            "stage=frontier", f"stage.evaluations=[{first},{folder}]", "logger.progress=off",
            f"run_dir={tmp_path}/out-{folder.name}",
        )  # fmt: skip
        with pytest.raises(
            ConfigError, match=rf"evaluations: .* differ in {key} \(.*plot them sep"
        ):
            run(config, ["dpo-run"])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{}\n", DataError, r"points.jsonl:1: is not a point"),
        ("[3]\n", DataError, r"points.jsonl:1: is not a point"),
        (
            '{"method": "dpo", "setting": "", "reward": 1.0, "kl": null}\n',
            DataError,
            "none of them measured the KL",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, text, error, message):
    folder = tmp_path / "e"
    folder.mkdir()
    (folder / "points.jsonl").write_text(text)
    config = configure(
        "stage=frontier", f"stage.evaluations=[{folder}]", "logger.progress=off",
        f"run_dir={tmp_path}/out",
    )  # fmt: skip
    with pytest.raises(error, match=message):
        run(config, ["dpo-run"])


def test_an_optimum_alone_and_a_method_alone_are_drawn(tmp_path):
    parts = {"optimum": points(0)[:5], "dpo": points(0)[5:7]}
    for name, rows in parts.items():
        folder = evaluation(tmp_path / name, rows)
        out = tmp_path / f"out-{name}"
        words = f"stage.evaluations=[{folder}]", f"run_dir={out}", "logger.progress=off"
        run(configure("stage=frontier", *words), ["dpo-run"])
        assert (out / "plots" / "frontier.png").is_file()
        assert ("| optimum |" in (out / "frontier.md").read_text()) == (name == "optimum")


def test_within_needs_a_point_of_every_seed():
    rows = [row("dpo", 1.0, 0.4), row("dpo", 3.0, 0.9), row("dpo", 2.0, 0.6, seed=1)]
    assert within(rows, 1.5) is None
    both = within(rows, 2.0)
    assert both is not None
    assert (both.reward, both.se) == (pytest.approx(0.5), pytest.approx(0.1))
    alone = within(rows[:2], 5.0)
    assert alone is not None
    assert (alone.reward, alone.se) == (0.9, 0.01)


def test_a_lead_within_the_error_is_called_so():
    ours, theirs = [row("a", 1, 0.51)], [row("b", 1, 0.50)]
    summaries = [summarize("b", theirs, [1.0]), summarize("a", ours, [1.0])]
    (lead,) = leads(summaries, [1.0])
    assert (lead.first, lead.second, lead.se) == ("a", "b", pytest.approx(0.01 * math.sqrt(2)))
    assert verdicts(summaries, [1.0]) == [
        "Up to a KL of 1: a is level with b (0.010 ± 0.014 higher)."
    ]
    unknown = [summarize(name, [row(name, 1, 0.5, reward_se=None)], [1.0]) for name in "ab"]
    assert verdicts(unknown, [1.0]) == [
        "Up to a KL of 1: a leads b, by 0.000 (standard error unknown)."
    ]
    assert leads(summaries[:1], [1.0]) == []


def test_the_reference_itself_leads_nobody():
    rows = {"reference": row("reference", 1e-6, 0.9), "a": row("a", 1, 0.5), "b": row("b", 1, 0.4)}
    summaries = [summarize(name, [own], [1.0]) for name, own in rows.items()]
    (line,) = verdicts(summaries, [1.0])
    assert line.startswith("Up to a KL of 1: a leads b, ")


def test_a_policy_measured_twice_counts_once():
    """By folder (with or without final), step and method; the later evaluation's row stays."""
    told: list[str] = []
    rows = [
        row("dpo", 1.0, 0.1, policy="r/a", step=5),
        row("dpo", 1.0, 0.2, policy="r/a/checkpoints/step-3", step=3),
        row("optimum", 1.0, 0.3, policy="r/a"),
        row("dpo", 2.0, 0.4, policy="r/a/final", step=5),
        row("mine", 2.0, 0.5, policy="r/a", step=5),
        row("optimum", 1.0, 0.3, policy="r/a"),
    ]
    assert [r["reward"] for r in measured_once(rows, told.append)] == [0.2, 0.3, 0.4, 0.5, 0.3]
    assert told == ["1 point is dropped: a later evaluation has the same policy"]


def test_a_dry_run_lists_the_evaluations_and_refuses_mixed_ones(tmp_path):
    first = evaluation(tmp_path / "a", points(0))
    other = evaluation(tmp_path / "b", points(1)[:3], max_new_tokens=64)
    assert planned(first, first)[1:] == [("evaluations", "1, 9 points"), ("", f"{first}: 9")]
    with pytest.raises(ConfigError, match=r"differ in stage\.max_new_tokens"):
        planned(first, other)


def planned(*folders):
    """The lines of a dry run that draws these evaluations."""
    config = configure("stage=frontier", f"stage.evaluations=[{','.join(map(str, folders))}]")
    return list(plan(Preview(config, Runtime(torch.device("cpu"), "fp32"))))


@pytest.mark.parametrize(
    ("kls", "expected"),
    [([0.5, 4.9, 5.5], [1, 2, 5]), ([0.03], [0.01, 0.02, 0.05]), ([9] * 9 + [400], [2, 5, 10])],
)
def test_budgets_end_near_the_largest_kl_but_a_tenth(kls, expected):
    assert budgets(kls) == expected


def test_far_outliers_do_not_squeeze_the_others():
    def limit(*methods):
        return kl_limit([np.array(kls) for kls in methods])

    assert limit([0.5, 1.0, 3.0, 4.0, 9.0]) == 9.0
    assert limit([0.5, 1.0, 3.0, 4.0, 120.0]) == 4.0
    assert limit([0.0, 0.0, 0.0, 0.0, 2.0]) == 2.0
    assert limit([0.5, 1.0, 1.0, 1.0], [3.5, 9.0]) == 3.5  # the other method's first is seen
    assert limit([0.5, 1.0, 1.0, 1.0], [40.0]) == 1.0  # too far: the caption names it
    assert limit([0.0], [1e-4, 0.002]) == limit([0.0]) == 0.1
    assert limit() == 1.0


def test_a_method_too_far_to_be_seen_is_named():
    zero = np.zeros(1)
    near, far = (
        Cloud(name, np.array([kl]), zero, zero, zero, zero == 0)
        for name, kl in (("a", 1), ("b", 90))
    )
    assert "1 point to the right (all of b), up to a KL of 90" in _caption([near, far], None, 1.0)


def test_the_curve_of_several_seeds():
    one, two = ([(0.0, 0.0, 0.1), (4.0, x, 0.1)] for x in (1.0, 3.0))
    kl, reward, low, high = mean_curve([one, two])
    assert kl[-1] == pytest.approx(4.0)
    assert (reward[-1], low[-1], high[-1]) == pytest.approx((2.0, 1.0, 3.0))
    np.testing.assert_allclose(reward, np.sqrt(kl))  # linear in sqrt(KL)
    single = mean_curve([one])
    np.testing.assert_allclose(single[3] - single[1], 0.1)


def test_methods_are_told_apart_by_colour_and_shape():
    names = ["dpo", "mine", "sft", "ppo-baseline", "theirs", "unlikelihood"]
    given = styles(names)
    assert len({(colour, marker) for colour, marker, _ in given}) == len(names)
    assert len({marker for _, marker, _ in given}) == len(names)
    assert styles(["other", "dpo"])[1] == given[0]  # the same whoever else is there


def test_the_last_point_of_each_run_is_marked():
    rows = [
        {**row("dpo", 1, 1, step=step, setting=setting), "evaluation": "e"}
        for setting, step in (("beta=1", 50), ("beta=1", 100), ("beta=2", 70), ("", None))
    ]
    found: Cloud = cloud("dpo", rows)
    assert found.last.tolist() == [False, True, True, True]
