"""stage=kto: losses on single responses by hand, against TRL, and whole runs."""

import json
import math

import numpy as np
import pytest
import torch

from dpo_cli.config import KtoConfig
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.losses.kto import SINGLE_LOSSES, kl_estimate, mean_reward
from dpo_cli.records import EncodedExample
from dpo_cli.run import run
from dpo_cli.stages.kto import Labelled, balance_lines, mismatched
from small_runs import TINY, configure, metrics, train

RHO, LABELS = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([True, False, False])


def sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


def test_kto_by_hand():
    """z_0 is the mean of 0.5 and 1.5; the first response is desirable."""
    shift = kl_estimate(torch.tensor([0.5, 1.5]))
    losses = SINGLE_LOSSES["kto"].compute(RHO, LABELS, shift, 0.1)
    expected = [1 - sigmoid(0.1 * (1 - 1)), 1 - sigmoid(0.1 * (1 + 2)), 1 - sigmoid(0.1 * (1 - 3))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_kl_estimate_is_not_negative_and_has_no_gradient():
    values = torch.tensor([-3.0, 1.0], requires_grad=True)
    assert kl_estimate(values).item() == 0.0
    assert not kl_estimate(values).requires_grad


def test_bco_by_hand():
    """Mean rewards 0.1 and (-0.2 + 0.3) / 2 = 0.05, so delta = 0.075."""
    shift = mean_reward(RHO, LABELS, 0.1)
    assert shift.item() == pytest.approx(0.075)
    losses = SINGLE_LOSSES["bco"].compute(RHO, LABELS, shift, 0.1)
    logits = [0.1 - 0.075, -(-0.2 - 0.075), -(0.3 - 0.075)]
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-z)) for z in logits], rel=1e-6)


def test_one_class_alone_gives_its_own_mean():
    assert mean_reward(RHO, torch.tensor([True] * 3), 0.3).item() == pytest.approx(0.2)


def test_apo_zero_by_hand():
    losses = SINGLE_LOSSES["apo_zero"].compute(RHO, LABELS, torch.tensor(0.0), 0.1)
    assert losses.tolist() == pytest.approx([1 - sigmoid(0.1), sigmoid(-0.2), sigmoid(0.3)])


def example(prompt: list[int], response: list[int]) -> EncodedExample:
    return EncodedExample(np.array(prompt, np.int32), (np.array(response, np.int32),), 0)


def test_mismatched_responses_are_of_the_next_other_prompt():
    rows = [example([1, 2], [3, 4]), example([1, 2], [5]), example([6], [7, 8, 9])]
    second = [list(row.response_ids[1]) for row in mismatched(rows, max_length=4)]
    assert second == [[7, 8], [7, 8], [3, 4]]  # two tokens of room behind [1, 2]


def test_weights_out_of_balance_are_told():
    rows = Labelled([example([1], [2])] * 4, np.array([True, False, False, False]))
    lines = list(balance_lines(rows, KtoConfig()))
    assert lines[0] == "1 desirable and 3 undesirable responses"
    assert lines[1].endswith("stage.desirable_weight=3")
    assert len(list(balance_lines(rows, KtoConfig(desirable_weight=3.0)))) == 1


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sft"
    train(folder, "stage=sft", "train.max_steps=12", "optim.lr=3e-3")
    return folder


KTO = ("stage=kto", "optim.lr=1e-3", "train.max_steps=12")


def column(run_dir, name):
    return [row[name] for row in metrics(run_dir) if name in row]


@pytest.mark.parametrize("loss", SINGLE_LOSSES)
def test_pairs_train(sft, tmp_path, loss):
    folder = tmp_path / "r"
    train(folder, *KTO, f"model.path={sft}", f"stage.loss={loss}")
    start = {"kto": 0.5, "apo_zero": 0.5, "bco": math.log(2)}[loss]
    assert column(folder, "loss")[0] == pytest.approx(start, abs=1e-5)
    assert column(folder, "eval/rewards/margins")[-1] > 0.0


def test_the_reference_in_every_step_gives_the_same(sft, tmp_path):
    for kind in ("cached", "live"):
        train(tmp_path / kind, *KTO, f"model.path={sft}", f"stage.reference_logprobs={kind}",
              "train.max_steps=4")  # fmt: skip
    cached, live = (column(tmp_path / kind, "loss") for kind in ("cached", "live"))
    assert cached == pytest.approx(live, abs=1e-5)


def write(path, labels):
    rows = [
        {"prompt": f"Number {i} is", "completion": f" {'odd' if i % 2 else 'even'} of course",
         "label": label}
        for i, label in enumerate(labels)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_on_file(run_dir, *overrides):
    words = [word for word in TINY if not word.startswith("data.rows")]
    run(configure(*words, f"run_dir={run_dir}", *overrides), ["dpo-run"])


JSONL = ("data=jsonl", "data.chosen_field=completion", "data.label_field=label",
         "data.eval_rows=4")  # fmt: skip


def test_rows_with_a_label_train(sft, tmp_path):
    write(tmp_path / "rows.jsonl", [i % 3 == 0 for i in range(24)])
    train_on_file(
        tmp_path / "r", *KTO, f"model.path={sft}", *JSONL, f"data.path={tmp_path / 'rows.jsonl'}",
        "train.max_steps=6", "train.batch_size=4",
    )  # fmt: skip
    losses = column(tmp_path / "r", "loss")
    assert losses[0] == pytest.approx(0.5, abs=1e-5)
    assert sum(losses[-3:]) < sum(losses[:3])


def test_a_label_that_is_none_is_refused(sft, tmp_path):
    write(tmp_path / "rows.jsonl", ["good"] * 8)
    with pytest.raises(DataError, match="label is str, not true or false, 1 or 0"):
        train_on_file(
            tmp_path / "r", *KTO, f"model.path={sft}", *JSONL,
            f"data.path={tmp_path / 'rows.jsonl'}",
        )  # fmt: skip


@pytest.mark.parametrize("stage", ["dpo", "reward", "sft"])
def test_other_stages_refuse_labels(stage, tmp_path):
    write(tmp_path / "rows.jsonl", [True] * 8)
    with pytest.raises(ConfigError, match=r"data\.label_field=label: .*stage=kto"):
        configure(f"stage={stage}", *JSONL, f"data.path={tmp_path / 'rows.jsonl'}")


def test_kto_agrees_with_trl():
    """Value and gradient against the formulas inside TRL's trainer, fed through a stand-in."""
    module = pytest.importorskip("trl.trainer.kto_trainer")
    torch.manual_seed(0)
    policy = torch.randn(6, 5, requires_grad=True)
    reference, mismatch, mismatch_reference = (torch.randn(6, 5) for _ in range(3))
    labels = torch.tensor([True, False, True, True, False, False])
    theirs = trl_loss(module, policy, reference, mismatch, mismatch_reference, labels)
    rho = (policy - reference).sum(1)
    shift = kl_estimate((mismatch - mismatch_reference).sum(1))
    weights = torch.where(labels, 1.5, 0.5)
    ours = (weights * SINGLE_LOSSES["kto"].compute(rho, labels, shift, 0.2)).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    grads = torch.autograd.grad(ours, policy), torch.autograd.grad(theirs, policy)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def trl_loss(module, policy, reference, mismatch, mismatch_reference, labels):
    from collections import defaultdict
    from types import SimpleNamespace

    outputs = SimpleNamespace(log_probs=policy, entropy=policy, mean_logits=policy)
    trainer = SimpleNamespace(
        model=torch.nn.Identity(), accelerator=SimpleNamespace(
            device="cpu", gather_for_metrics=lambda x: x),
        aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=True, beta=0.2,
        loss_type="kto", desirable_weight=1.5, undesirable_weight=0.5,
        _compute_kl_logps=lambda model, batch: mismatch.sum(1),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    trainer.model.train()
    batch = {
        "input_ids": torch.zeros(6, 6, dtype=torch.long),
        "attention_mask": torch.ones(6, 6, dtype=torch.long),
        "completion_mask": torch.ones(6, 6, dtype=torch.long),
        "label": labels, "ref_logps": reference.sum(1), "ref_KL_logps": mismatch_reference.sum(1),
    }  # fmt: skip
    return module.KTOTrainer._compute_loss(trainer, lambda **k: outputs, batch, False)
