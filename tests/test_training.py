"""Whole runs on the embedded data: what is promised of DPO, resuming and micro-batches."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.durable import file_digest
from dpo_cli.errors import CheckpointError, ConfigError, NonFiniteError, Preempted
from dpo_cli.losses import LOSSES
from dpo_cli.train import loop
from small_runs import TINY, configure, metrics, train

DPO = ("stage=dpo", "optim.lr=1e-3", "train.max_steps=6")


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sft"
    train(folder, "stage=sft", "train.max_steps=12", "optim.lr=3e-3")
    return folder


def column(run_dir, name):
    return [row[name] for row in metrics(run_dir) if name in row]


def weights(run_dir):
    return load_file(run_dir / "final" / "model.safetensors")


def assert_same_weights(a, b):
    assert file_digest(a / "final" / "model.safetensors") == file_digest(
        b / "final" / "model.safetensors"
    )


def test_sft_learns_and_leaves_a_hugging_face_model(sft):
    losses = column(sft, "loss")
    assert losses[-1] < losses[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(sft / "final")
    tokenizer = AutoTokenizer.from_pretrained(sft / "final")
    ids = tokenizer("The film was", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()
    assert (sft / "final" / "README.md").is_file()
    steps = {json.loads(line)["step"] for line in (sft / "samples.jsonl").read_text().splitlines()}
    assert {0, 12} <= steps


def test_sft_loss_is_the_plain_cross_entropy(sft, tmp_path):
    """The first logged loss against transformers' own loss on the same rows."""
    train(tmp_path / "r", f"model.path={sft}", "stage=sft", "train.max_steps=1",
          "train.batch_size=48", "train.shuffle=false")  # fmt: skip
    logged = column(tmp_path / "r", "loss")[0]
    from dpo_cli.data.dataset import load_encoded

    config = configure("data.rows=48", "data.eval_rows=12", f"cache_dir={tmp_path / 'c'}")
    model = AutoModelForCausalLM.from_pretrained(sft / "final")
    tokenizer = AutoTokenizer.from_pretrained(sft / "final")
    rows = load_encoded(config.data, tokenizer, 256, 0, tmp_path / "c").train
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([*row.prompt_ids, *row.response_ids[0]])[None].long()
        labels = ids.clone()
        labels[0, : len(row.prompt_ids)] = -100
        n = len(row.response_ids[0])
        total += model(input_ids=ids, labels=labels).loss.item() * n
        count += n
    assert logged == pytest.approx(total / count, abs=1e-5)


def test_dpo_starts_at_ln_2_and_learns(sft, tmp_path):
    train(tmp_path / "r", *DPO, f"model.path={sft}", "train.max_steps=20")
    losses = column(tmp_path / "r", "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert column(tmp_path / "r", "eval/loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert column(tmp_path / "r", "eval/rewards/accuracies")[0] == 0.5
    assert losses[-1] < 0.6
    provenance = json.loads((tmp_path / "r" / "final" / "dpo_run.json").read_text())
    assert provenance["reference"] == str(sft)


def test_cached_reference_equals_live(sft, tmp_path):
    for kind in ("cached", "live"):
        train(tmp_path / kind, *DPO, f"model.path={sft}", f"stage.reference_logprobs={kind}")
    for name in ("loss", "logratios/chosen", "eval/loss"):
        assert column(tmp_path / "cached", name) == pytest.approx(
            column(tmp_path / "live", name), abs=2e-5
        )


def test_a_sweep_shares_one_reference_pass(sft, tmp_path, monkeypatch):
    from dpo_cli.session import reference

    passes = []
    real = reference.compute
    monkeypatch.setattr(reference, "compute", lambda *a: passes.append(a[-1]) or real(*a))
    cache = f"cache_dir={tmp_path / 'cache'}"
    for beta in (0.1, 1.0):
        train(tmp_path / str(beta), *DPO, f"model.path={sft}", f"stage.beta={beta}", cache)
    assert len(passes) == 2  # train and eval, once
    train(tmp_path / "longer", *DPO, f"model.path={sft}", "data.max_length=20", cache)
    assert len(passes) == 4  # other token ids


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_micro_batches_do_not_change_the_step(sft, tmp_path, stage):
    """One row of everything against a row an example: figures to 1e-6."""
    for tokens in (100_000, 1):
        train(tmp_path / str(tokens), f"stage={stage}", f"model.path={sft}", "optim.lr=1e-3",
              "train.max_steps=3", f"train.micro_batch_tokens={tokens}")  # fmt: skip
    names = ["loss", "grad_norm"] + (["rewards/margins"] if stage != "sft" else [])
    for name in names:
        assert column(tmp_path / "1", name) == pytest.approx(
            column(tmp_path / "100000", name), abs=1e-5, rel=1e-5
        )
    many, one = (
        next(row for row in metrics(tmp_path / tokens) if "loss" in row)
        for tokens in ("1", "100000")
    )
    timed = {"time", "step_seconds", "peak_memory_mb"}
    compared = [n for n in many if n not in timed and not n.endswith("_per_second")]
    assert len(compared) > (8 if stage == "dpo" else 3)
    for name in compared:  # of the first step, before rounding has moved the weights apart
        assert many[name] == pytest.approx(one[name], rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("optimiser", ["adamw", "rmsprop", "adamw8bit"])
@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_resumed_equals_uninterrupted(sft, tmp_path, monkeypatch, stage, optimiser):
    """Interrupted after step 3 of 7 (across an epoch's end), dropout on: bit for bit."""
    common = (f"stage={stage}", f"model.path={sft}", f"optim={optimiser}", "optim.lr=1e-3",
              "model.dropout=0.1", "train.max_steps=7", "train.batch_size=16",
              "train.save_every_steps=2")  # fmt: skip
    train(tmp_path / "whole", *common)
    real, calls = loop._train_step, []

    def die_at_four(run):
        calls.append(run.step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(run)

    monkeypatch.setattr(loop, "_train_step", die_at_four)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", *common)
    monkeypatch.setattr(loop, "_train_step", real)
    train(tmp_path / "cut", *common, "resume=true")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    same = [r for r in metrics(tmp_path / "whole") if "loss" in r]
    cut = [r for r in metrics(tmp_path / "cut") if "loss" in r]
    assert [(r["step"], r["loss"]) for r in same] == [(r["step"], r["loss"]) for r in cut]


def test_a_signal_saves_and_resumes(sft, tmp_path, monkeypatch):
    import os
    import signal

    common = ("stage=sft", f"model.path={sft}", "train.max_steps=5", "train.save_every_steps=0")
    train(tmp_path / "whole", *common)
    real = loop._train_step

    def signalled(run):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run)

    monkeypatch.setattr(loop, "_train_step", signalled)
    with pytest.raises(Preempted, match=r"SIGTERM after step 3 of 5.*dpo-run resume=") as error:
        train(tmp_path / "cut", *common)
    assert error.value.exit_code == 75
    assert not (tmp_path / "cut" / "final").exists()
    monkeypatch.setattr(loop, "_train_step", real)
    train(tmp_path / "cut", *common, "resume=true")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    whole, cut = (
        json.loads((tmp_path / name / "checkpoints" / "step-5" / "MANIFEST.json").read_text())
        for name in ("whole", "cut")
    )
    for key in ("config_sha256", "data"):  # the folders have other names
        assert whole[key] == cut[key]
        assert len(whole[key]) == 64


def test_resume_refuses_another_run(sft, tmp_path):
    common = ("stage=dpo", f"model.path={sft}", "train.max_steps=2")
    train(tmp_path / "r", *common)
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1; stage\.beta: 0\.1 -> 0\.5"):
        train(tmp_path / "r", *common, "stage.beta=0.5", "seed=1", "resume=true")
    with pytest.raises(CheckpointError, match="not a run folder"):
        train(tmp_path / "other", *common, "resume=true")


def test_resume_refuses_changed_rows_and_reference(sft, tmp_path):
    rows = [{"prompt": f"The film {i}", "chosen": " was good.", "rejected": f" was bad {i}."}
            for i in range(24)]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ("stage=dpo", f"model.path={sft}", f"data.path={path}", "train.max_steps=4")
    run_jsonl(tmp_path / "r", *words)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows[:-1]))
    with pytest.raises(ConfigError, match=r"different run \(rows: .* -> .*; reference"):
        run_jsonl(tmp_path / "r", *words, "resume=true")


def test_resume_refuses_a_reference_trained_anew(sft, tmp_path):
    """The rows are the same, and the folder has the same name: only its weights are others."""
    shutil.copytree(sft / "final", tmp_path / "reference")
    words = ("stage=dpo", f"model.path={sft}", f"stage.reference={tmp_path / 'reference'}",
             "train.max_steps=2")  # fmt: skip
    train(tmp_path / "r", *words)
    train(tmp_path / "other", "stage=sft", f"model.path={sft}", "train.max_steps=1")
    shutil.rmtree(tmp_path / "reference")
    shutil.copytree(tmp_path / "other" / "final", tmp_path / "reference")
    with pytest.raises(ConfigError, match=r"different run \(reference: ") as error:
        train(tmp_path / "r", *words, "resume=true")
    assert "rows" not in str(error.value).split("restore")[0]


def run_jsonl(run_dir, *words):
    from dpo_cli.run import run

    quiet = [w for w in TINY if not w.startswith(("data.rows", "data.eval_rows"))]
    return run(configure(*quiet, "data=jsonl", f"run_dir={run_dir}", *words), ["dpo-run"])


def test_the_reference_key_knows_the_models_shape(tmp_path):
    """Four heads and two have weights of the same shapes, and other log-probabilities."""
    cache = f"cache_dir={tmp_path / 'cache'}"
    for heads in (2, 4):
        train(tmp_path / str(heads), *DPO, f"model.architecture.heads={heads}", cache)
        assert column(tmp_path / str(heads), "loss")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_best_is_the_lowest_perplexity(tmp_path):
    train(tmp_path / "r", "stage=sft", "train.max_steps=8", "train.best_metric=perplexity",
          "optim.lr=3e-3")  # fmt: skip
    best = json.loads((tmp_path / "r" / "best.json").read_text())
    assert best["value"] == min(column(tmp_path / "r", "eval/perplexity")[1:])
    with pytest.raises(ConfigError, match=r"train\.best_metric=perplexty.*did you mean perplexity"):
        configure("stage=sft", "train.best_metric=perplexty")


def test_a_step_that_blew_the_weights_up_is_not_saved(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 1: the loss after this step"):
        train(tmp_path / "r", "stage=sft", "optim.lr=1e30", "optim.warmup_steps=0",
              "train.max_steps=4", "train.save_every_steps=1", "data.eval_rows=0")  # fmt: skip
    assert not list((tmp_path / "r" / "checkpoints").glob("step-*"))


def test_dropout_with_weights_from_scratch(tmp_path):
    train(tmp_path / "r", "stage=sft", "model.dropout=0.1", "train.max_steps=2")
    assert len(column(tmp_path / "r", "loss")) == 2


def test_bf16_trains_close_to_fp32(sft, tmp_path):
    for precision in ("fp32", "bf16"):
        train(tmp_path / precision, *DPO, f"model.path={sft}", "train.max_steps=12",
              f"hardware.precision={precision}")  # fmt: skip
    fp32, bf16 = (column(tmp_path / p, "loss") for p in ("fp32", "bf16"))
    assert bf16[0] == pytest.approx(math.log(2), abs=1e-3)
    assert bf16 == pytest.approx(fp32, abs=0.03)


def test_nothing_bad_is_stepped_or_saved(sft, tmp_path):
    with pytest.raises(NonFiniteError, match=r"step \d+: .*optim\.lr") as error:
        train(tmp_path / "r", "stage=sft", f"model.path={sft}", "optim.lr=1e20",
              "optim.warmup_steps=0", "train.max_steps=5")  # fmt: skip
    assert error.value.exit_code == 4
    assert not (tmp_path / "r" / "final").exists()


def test_a_dpo_policy_needs_its_reference_named(sft, tmp_path):
    train(tmp_path / "a", *DPO, f"model.path={sft}")
    with pytest.raises(ConfigError, match=r"stage\.reference"):
        train(tmp_path / "b", *DPO, f"model.path={tmp_path / 'a'}")
    train(tmp_path / "c", *DPO, f"model.path={tmp_path / 'a'}", f"stage.reference={sft}")
    first = column(tmp_path / "c", "logratios/chosen")[0]
    assert abs(first) > 1e-3  # the policy starts away from its reference


def test_ranked_lists(sft, tmp_path):
    """Plackett-Luce starts at ln 3!, the mean over all pairs of a list at ln 2."""
    lists = ("stage=dpo", f"model.path={sft}", "data.responses=3", "train.max_steps=2")
    for loss, start in (("plackett_luce", math.log(6)), ("sigmoid", math.log(2))):
        train(tmp_path / loss, *lists, f"stage.loss={loss}")
        assert column(tmp_path / loss, "loss")[0] == pytest.approx(start, abs=1e-5)


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"sigmoid", "plackett_luce", "file"}))
def test_other_losses_train(sft, tmp_path, loss):
    words = ["stage.beta=2.0"] if loss == "simpo" else []
    words += ["stage.label_smoothing=0.01"] if loss == "exo" else []
    folder = tmp_path / "r"
    train(folder, *DPO, f"model.path={sft}", f"stage.loss={loss}", "train.max_steps=18", *words)
    losses = column(folder, "loss")
    assert sum(losses[-6:]) < sum(losses[:6])  # six steps are an epoch
    assert bool(column(folder, "logratios/chosen")) == LOSSES[loss].reference


def test_losses_without_a_reference_load_none(sft, tmp_path, monkeypatch):
    from dpo_cli.session import reference

    def refuse(*_: object) -> None:
        raise AssertionError("no reference is needed")

    monkeypatch.setattr(reference, "compute", refuse)
    monkeypatch.setattr("dpo_cli.stages.preference.load_reference", refuse)
    train(tmp_path / "r", *DPO, f"model.path={sft}", "stage.loss=simpo", "train.max_steps=2")


def test_ld_alpha_weighs_policy_and_reference_alike(sft, tmp_path):
    for way in ("cached", "live"):
        train(tmp_path / way, *DPO, f"model.path={sft}", "stage.ld_alpha=0.3",
              f"stage.reference_logprobs={way}", "train.max_steps=3")  # fmt: skip
        assert column(tmp_path / way, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    cached, live = (column(tmp_path / way, "loss") for way in ("cached", "live"))
    assert cached == pytest.approx(live, abs=1e-5)


def test_nll_weight_adds_the_chosen_nll(sft, tmp_path):
    for weight in (0.0, 2.0):
        train(tmp_path / str(weight), *DPO, f"model.path={sft}", f"stage.nll_weight={weight}",
              "train.batch_size=48", "train.max_steps=1")  # fmt: skip
    plain, mixed = (column(tmp_path / str(w), "loss")[0] for w in (0.0, 2.0))
    assert plain == pytest.approx(math.log(2), abs=1e-5)
    per_token = (mixed - plain) / 2.0
    assert 1.0 < per_token < math.log(1024) + 1  # nats a token of a barely trained model
