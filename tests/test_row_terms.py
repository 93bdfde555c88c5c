"""Weight, margin and smoothing of rows: read, cached, and their place in the losses."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import small_tokenizers
from dpo_cli.config import DpoConfig, JsonlDataConfig
from dpo_cli.data.dataset import load_encoded
from dpo_cli.errors import ConfigError
from dpo_cli.losses import LOSSES, RankedLogprobs
from dpo_cli.run import run
from dpo_cli.stages.preference import loss_of_lists, objective
from small_runs import TINY, configure, metrics

ROWS = [
    {"prompt": f"q{i} ", "chosen": "good", "rejected": "bad", "w": i / 8, "m": i / 4, "e": i / 100}
    for i in range(40)
]
FIELDS = {"weight_field": "w", "margin_field": "m", "smoothing_field": "e"}
MARGIN = [name for name, loss in LOSSES.items() if "margin" in loss.terms]
SMOOTHING = [name for name, loss in LOSSES.items() if "smoothing" in loss.terms]
WEIGHT = [name for name, loss in LOSSES.items() if "weight" in loss.terms and name != "file"]


def load(folder, rows, **fields):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = JsonlDataConfig(path=str(path), eval_rows=8, **fields)
    return load_encoded(config, small_tokenizers.byte_level(), 64, 0, folder / "cache")


def test_terms_stay_with_their_rows_in_the_cache_and_identify_the_run(tmp_path):
    rows = [*ROWS]
    rows[4] = rows[4] | {"chosen": " "}  # dropped: no neighbour gets its numbers
    first, again = (load(tmp_path, rows, **FIELDS) for _ in range(2))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for splits in (first, again):
        assert len(splits.eval) == 8
        for e in [*splits.train, *splits.eval]:
            assert e.terms == (e.row / 8, e.row / 4, e.row / 100)
    assert first.fingerprint == again.fingerprint
    rows[9] = rows[9] | {"w": 3.0}
    prints = {load(tmp_path, rows, **FIELDS).fingerprint, load(tmp_path, rows).fingerprint}
    assert len(prints | {first.fingerprint}) == 3
    (one,) = {e.terms for e in load(tmp_path, rows).train}
    assert one is None


@pytest.mark.parametrize(
    ("term", "value", "reason"),
    [
        ("weight", -1, "w is -1, must be at least 0"),
        ("weight", 1e7, "w is 1e+07, must be at most 1,000,000"),
        ("margin", float("nan"), "w is not a finite number"),
        ("margin", True, "w is bool, not a number"),
        ("smoothing", 0.5, r"w is 0.5, must be in [0, 0.5)"),
        ("smoothing", None, "w is None, not a number"),
    ],
)
def test_numbers_out_of_bounds_drop_the_row(tmp_path, term, value, reason):
    rows = [row | {"w": 0.25} for row in ROWS]
    rows[7]["w"] = value
    splits = load(tmp_path, rows, **{f"{term}_field": "w"})
    assert splits.drops.summary_lines() == [f"dropped 1 of 40 rows: {reason} (row 7)"]


def random_lists(seed, size, count=2):
    torch.manual_seed(seed)
    shape = (size, count)
    return RankedLogprobs(
        -4 * torch.rand(shape) - 1, -4 * torch.rand(shape) - 1, torch.randint(1, 9, shape).float()
    )


def test_which_losses_take_which():
    assert MARGIN == ["sigmoid", "robust", "hinge", "rdpo", "simpo", "cpo"]
    assert SMOOTHING == ["sigmoid", "robust", "simpo", "cpo"]
    assert set(LOSSES) - set(WEIGHT) == {"aot", "file"}


@pytest.mark.parametrize("name", WEIGHT)
@given(st.integers(0, 99), st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3))
@settings(deadline=None, max_examples=10)
def test_a_row_of_weight_0_is_absent(name, seed, weights):
    lists, stage = random_lists(seed, 4), DpoConfig(loss=name, label_smoothing=0.1, nll_weight=0.5)
    weights = [1.0, *weights]
    terms = {"weight": torch.tensor(weights)}
    rest = [i for i, weight in enumerate(weights) if weight]
    there = RankedLogprobs(*(x[rest] for x in (lists.policy, lists.reference, lists.lengths)))
    lists.policy.requires_grad_()
    total = objective(lists, stage, terms).sum()
    total.backward()
    assert total.item() == pytest.approx(objective(there, stage).sum().item(), rel=1e-5, abs=1e-6)
    absent = lists.policy.grad[[i for i, weight in enumerate(weights) if not weight]]
    assert not absent.any()


@pytest.mark.parametrize("name", MARGIN)
@given(st.integers(0, 99), st.floats(-3, 3))
@settings(deadline=None, max_examples=10)
def test_margin_0_is_none_and_others_shift_the_logit(name, seed, margin):
    pairs, stage = random_lists(seed, 3), DpoConfig(loss=name, beta=0.5, label_smoothing=0.0)
    plain = loss_of_lists(name, pairs, stage)
    assert torch.equal(loss_of_lists(name, pairs, stage, {"margin": torch.zeros(3)}), plain)
    # a margin of m is what log-ratios that are m / beta further apart undo
    per_token = pairs.lengths[:, 0] if name == "simpo" else torch.ones(3)
    policy = pairs.policy.clone()
    policy[:, 0] += margin / stage.beta * per_token
    moved = RankedLogprobs(policy, pairs.reference, pairs.lengths)
    found = loss_of_lists(name, moved, stage, {"margin": torch.full((3,), margin)})
    if name == "cpo":  # its NLL moves with the policy
        found = found + margin / stage.beta / pairs.lengths[:, 0]
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMOOTHING)
def test_rows_have_their_own_smoothing(name):
    lists, own = random_lists(3, 2, 3), torch.tensor([0.0, 0.3])
    found = loss_of_lists(name, lists, DpoConfig(loss=name), {"smoothing": own})
    for row, smoothing in enumerate((0.0, 0.3)):
        stage = DpoConfig(loss=name, label_smoothing=smoothing)
        assert found[row].item() == pytest.approx(loss_of_lists(name, lists, stage)[row].item())


def test_a_margin_by_hand():
    """h = 3, beta 0.1, margin 0.5: -log sigmoid(0.3 - 0.5); of weight 2."""
    pair = RankedLogprobs(
        torch.tensor([[-9.0, -14.0]]), torch.tensor([[-10.0, -12.0]]), torch.ones(1, 2)
    )
    terms = {"margin": torch.tensor([0.5]), "weight": torch.tensor([2.0])}
    expected = 2 * math.log(1 + math.exp(0.2))
    assert objective(pair, DpoConfig(), terms).item() == pytest.approx(expected, rel=1e-6)


def test_a_run_with_terms(tmp_path):
    """With margins the first loss is that of equal policies; weights multiply it."""
    rows = [row | {"w": 3.0, "m": 1.0} for row in ROWS]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [word for word in TINY if not word.startswith("data.rows")]
    words = ("data=jsonl", f"data.path={path}", "train.max_steps=2", "data.eval_rows=8",
             "data.weight_field=w", "data.margin_field=m")  # fmt: skip
    run(configure(*small, "stage=dpo", f"run_dir={tmp_path / 'r'}", *words), ["dpo-run"])
    start = pytest.approx(3 * math.log(1 + math.exp(1)), rel=1e-4)
    for name in ("loss", "eval/loss"):
        assert next(row[name] for row in metrics(tmp_path / "r") if name in row) == start


def test_a_mix_has_no_terms(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    with pytest.raises(ConfigError, match=r"sources\.a\.weight_field=w: is not read with data=mix"):
        configure("stage=dpo", "data=mix", f"data.sources={{a:{{path:'{path}',weight_field:w}}}}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stage=dpo stage.loss=ipo data.margin_field=m",
         r"data\.margin_field=m: stage\.loss=ipo takes none, only sigmoid, robust, .* do$"),
        ("stage=dpo stage.loss=aot data.weight_field=w", r"stage\.loss=aot takes none"),
        ("stage=dpo stage.loss=exo stage.label_smoothing=0.1 data.smoothing_field=e",
         r"stage\.loss=exo takes none, only sigmoid, robust, simpo, cpo do"),
        ("stage=dpo stage.extra_losses={bco:0.2} data.margin_field=m", r"loss=bco takes none"),
        ("stage=dpo stage.label_smoothing=0.1 data.smoothing_field=e",
         r"stage\.label_smoothing=0\.1: has no effect with data\.smoothing_field=e"),
    ],
)  # fmt: skip
def test_what_a_loss_cannot_take_is_refused(tmp_path, words, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    with pytest.raises(ConfigError, match=message):
        configure("data=jsonl", f"data.path={path}", *words.split())
