"""What a run was trained on is known to whoever measures it: held out means held out."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import pytest

from dpo_cli.data import cache, trained
from dpo_cli.data.dataset import load_splits
from dpo_cli.durable import damage
from dpo_cli.errors import DataError
from dpo_cli.plan.dry_run import plan_rows
from dpo_cli.records import EncodedExample
from dpo_cli.run import run
from dpo_cli.session.trained import MANY, refuse_same
from small_runs import TINY, configure
from small_runs import train as train_tiny

WORDS = ("good", "bad", "dull", "fine", "long", "short", "old", "new")
ROWS = [
    {
        "prompt": f"a {first} film with a {second} end number {n}",
        "chosen": f" was {first} and {second}",
        "rejected": f" was not {second}",
    }
    for n, (first, second) in enumerate((a, b) for a in WORDS for b in WORDS if a != b)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own_keys(rows):
    """Worked out here, from the rows alone."""
    digests = [hashlib.sha256(row["prompt"].encode()).digest()[:8] for row in rows]
    return {int.from_bytes(digest, "little") for digest in digests}


def jsonl(path, *words):
    return ["data=jsonl", f"data.path={path}", "data.eval_rows=8", *words]


def train(run_dir, *words):
    """TINY's words of the generated data are not those of a file."""
    words = [w for w in TINY if not w.startswith("data.")] + list(words)
    return run(configure(*words, f"run_dir={run_dir}"), ["dpo-run"])


QUICK = "train.max_steps=1", "train.sample_prompts=0"
MEASURE = "stage=evaluate", "stage.prompts=6", "stage.max_new_tokens=2", "reward_fn=length"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """SFT on 40 rows, DPO on 16 others from it, and a reward model of those."""
    home = tmp_path_factory.mktemp("chain")
    first, second = write(home / "a.jsonl", ROWS[:40]), write(home / "b.jsonl", ROWS[40:])
    train(home / "sft", "stage=sft", *jsonl(first), *QUICK)
    on = f"model.path={home / 'sft'}"
    train(home / "dpo", "stage=dpo", on, *jsonl(second), *QUICK)
    train(home / "reward", "stage=reward", on, *jsonl(second), *QUICK, "stage.normalize_prompts=0")
    return home


def held(path):
    return {e.row for e in load_splits(configure(*jsonl(path)).data, 0).eval}


def test_the_keys_of_training_prompts_are_beside_the_weights_and_chained(chain):
    first = [row for n, row in enumerate(ROWS[:40]) if n not in held(chain / "a.jsonl")]
    second = [row for n, row in enumerate(ROWS[40:]) if n not in held(chain / "b.jsonl")]
    assert (len(first), len(second)) == (32, 8)
    for name, wanted in (("sft", first), ("dpo", first + second), ("reward", first + second)):
        final = chain / name / "final"
        assert set(trained.read(final).tolist()) == own_keys(wanted)
        assert (final / trained.TRAINED_PROMPTS).stat().st_size == 8 * len(wanted)
        assert damage(final) is None
        manifest = json.loads((final / "MANIFEST.json").read_text())
        assert trained.TRAINED_PROMPTS in manifest["files"]


def test_the_runs_own_held_out_prompts_are_measured(chain):
    words = *MEASURE, *jsonl(chain / "b.jsonl"), f"model.path={chain / 'dpo'}"
    summary = train(chain / "fine", *words)
    assert not {"trained_share", "prompts"} & summary.keys()
    assert summary["pairs"] == 8  # the held-out ones, without being asked
    share, n, z = summary["accuracy"], 8, 1.959964
    centre = (share + z**2 / 16) / (1 + z**2 / n)  # Wilson's interval
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    assert summary["accuracy_low"] == pytest.approx(max(0, centre - half), abs=1e-6)
    assert summary["accuracy_high"] == pytest.approx(min(1, centre + half), abs=1e-6)


def test_held_out_rows_that_the_start_was_trained_on_are_told(chain, tmp_path, capsys):
    """DPO holds out 20 of the rows of which its SFT held out 8."""
    words = "stage=dpo", f"model.path={chain / 'sft'}", *jsonl(chain / "a.jsonl"), *QUICK
    plain = "logger.progress=plain"
    more = train(tmp_path / "more", *words, "data.eval_rows=20", plain)
    told = f"12 of 20 held-out rows were trained on by model.path={chain / 'sft'}: use that run's"
    assert " ".join(capsys.readouterr().err.split()).count(told) == 1
    page = " ".join((tmp_path / "more" / "report.html").read_text().split())
    assert "12 of the 20 held-out rows had been trained on before" in page
    assert more["eval_rows_trained_on"] == 12  # beside the loss, for recipes and comparisons
    exported = "stage=export", f"model.path={tmp_path / 'more'}"
    run(configure(*exported, f"run_dir={tmp_path / 'out'}"), ["dpo-run"])
    for folder in ("more", "out"):  # cards that show its held-out loss
        card = (tmp_path / folder / "final" / "README.md").read_text()
        assert "| Held-out loss |" in card
        assert "| eval_rows_trained_on | 12 |" in card
    same = train(tmp_path / "same", *words, plain)
    assert "were trained on" not in capsys.readouterr().err
    assert "eval_rows_trained_on" not in same
    planned = configure(*(w for w in TINY if w[:5] != "data."), *words, "data.eval_rows=20")
    assert any(told in line for _, line in plan_rows(planned))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["data.eval_rows=15"],
            "7 of the 15 held-out prompts were in the training data of",
        ),  # of 16, 8 held
        (
            ["data.path={}/a.jsonl", "data.eval_rows=39"],
            "31 of the 39 held-out prompts were in",
        ),  # what SFT saw
        (["stage.pairs={}/b.jsonl"], "8 of the 16 held-out pairs were in the training data of"),
    ],
)
def test_rows_that_were_trained_on_are_not_called_held_out(chain, tmp_path, words, told):
    words = [*MEASURE, *jsonl(chain / "b.jsonl"), f"model.path={chain / 'dpo'}",
             *(word.format(chain) for word in words), "stage.prompts=100"]  # fmt: skip
    with pytest.raises(DataError, match=told) as error:
        train(tmp_path / "no", *words)
    assert "/dpo; use the data settings of that run" in str(error.value)
    assert "stage.allow_trained=true" in str(error.value)
    summary = train(tmp_path / "yes", *words, "stage.allow_trained=true")
    assert "reward" in summary


def test_a_reward_model_that_saw_the_rows_is_told(chain, tmp_path):
    words = [*MEASURE[:3], *jsonl(chain / "b.jsonl"), "data.eval_rows=15", "stage.prompts=15",
             f"model.path={chain / 'sft'}", "reward_fn=reward_model",
             f"reward_fn.path={chain / 'reward'}"]  # fmt: skip
    with pytest.raises(
        DataError, match=r"^7 of the 15 .* were in the training data of reward_fn\.path="
    ):
        train(tmp_path / "no", *words)


def test_training_prompts_are_called_so(chain, tmp_path):
    rows = f"data.path={chain / 'b.jsonl'}"
    words = *MEASURE, f"model.path={chain / 'dpo'}", "data=jsonl", "stage.prompts=16"
    summary = train(tmp_path / "same", *words, rows)
    assert (summary["prompts"], summary["trained_share"]) == ("training prompts", 0.5)
    assert "50.0% of these prompts were trained on" in " ".join(
        (tmp_path / "same" / "report.html").read_text().split()
    )
    new = write(tmp_path / "new.jsonl", [{**r, "prompt": "new " + r["prompt"]} for r in ROWS[:8]])
    assert "prompts" not in train(tmp_path / "new", *words, f"data.path={new}")


def test_generated_prompts_that_meet_by_chance_are_told_and_not_refused(tmp_path):
    """First words of reviews, which many reviews share: a sample of them says nothing of a row."""
    train_tiny(tmp_path / "sft", "stage=sft", "data.rows=400", *QUICK)
    words = *MEASURE[:3], "data.rows=8", f"model.path={tmp_path / 'sft'}", "stage.prompts=12"
    splits = load_splits(configure("data.rows=400", "data.eval_rows=12").data, 0)
    known = {e.prompt for e in splits.train}
    distinct = {e.prompt for e in splits.eval}
    share = sum(prompt in known for prompt in distinct) / len(distinct)
    assert 0 < share < 1
    summary = train_tiny(tmp_path / "evaluate", *words)
    assert summary["trained_share"] == pytest.approx(share)


def test_keys_survive_the_cache_and_the_form_of_a_prompt(tmp_path):
    ids = trained.np.arange(3, dtype="int32")
    examples = [EncodedExample(ids, (ids,), 0, key=2**64 - 1), EncodedExample(ids, (ids,), 1)]
    cache.save(tmp_path / "rows", {"train": examples}, {})
    assert [e.key for e in cache.load(tmp_path / "rows")[0]["train"]] == [2**64 - 1, 0]
    assert trained.prompt_key([{"role": "user", "content": "a b"}]) == trained.prompt_key("a b")
    digest = hashlib.sha256(b"a b").digest()
    assert trained.prompt_key("a b").to_bytes(8, "little") == digest[:8]
    kept = trained.as_bytes([5, 3, 5], trained.np.array([4, 3], trained.KEYS))
    assert trained.np.frombuffer(kept, trained.KEYS).tolist() == [3, 4, 5]
    assert trained.read(tmp_path) is None


def test_an_eval_file_of_training_prompts(tmp_path):
    path, other = write(tmp_path / "a.jsonl", ROWS[:6]), write(tmp_path / "b.jsonl", ROWS[4:9])

    def splits(held):
        data = "data=jsonl", f"data.path={path}", f"data.eval_path={held}"
        return load_splits(configure(*data).data, 0)

    data = "data=jsonl", f"data.path={path}", f"data.eval_path={path}"
    with pytest.raises(DataError, match="all 6 held-out prompts are also training"):
        train(tmp_path / "same", "stage=sft", *data, *QUICK)
    (line,) = splits(other).drops.summary_lines()
    assert line == (
        "note on 2 of 11 rows: eval split: the prompt is also a training prompt (rows 0, 1)"
    )


def test_a_run_without_held_out_rows_says_so(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ROWS[:16])
    for rows, said in ((0, 1), (4, 0)):
        words = "stage=sft", "data=jsonl", f"data.path={path}", f"data.eval_rows={rows}", *QUICK
        train(tmp_path / f"r{rows}", *words, "logger.progress=plain")
        assert capsys.readouterr().err.count("no rows are held out") == said


def test_few_short_prompts_may_all_be_known_by_chance():
    def splits(count):
        rows = [EncodedExample(None, (), n, key=n + 1) for n in range(count)]
        return SimpleNamespace(train=rows, eval=rows, origin="x")

    generated, own = configure("stage=sft").data, configure(*jsonl(__file__)).data
    refuse_same(generated, splits(MANY - 1))
    for config, count in ((generated, MANY), (own, 1)):
        with pytest.raises(DataError, match=f"all {count} held-out prompts are also training"):
            refuse_same(config, splits(count))
