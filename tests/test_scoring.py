"""reward_fn=classifier against transformers' own forward, and errors of one line."""

import re
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import small_tokenizers
from dpo_cli.errors import ConfigError, NonFiniteError
from dpo_cli.rewards.scorers import Completed
from dpo_cli.rewards.scoring import load_scorer
from scoring_helpers import scorer, session_of, texts

WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "and",
    "a",
    "dog",
    "ran",
    "to",
    "it",
    "in",
    "rain",
    "sun",
)
RAGGED = ["the cat", "the cat sat on the mat and the dog ran", "sun",
          "a dog ran to the cat in the sun and in the rain and to the mat and it sat on the mat",
          "the dog", "it sat"]  # fmt: skip
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "num_labels": 3}  # fmt: skip


def wordpiece():
    """BERT style: [CLS] text [SEP]; it has no EOS."""
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip


def bert():
    tokenizer = wordpiece()
    shape = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=24, **SMALL)
    return BertForSequenceClassification(shape), tokenizer, (2,), (3,), 24


def roberta():
    """Its positions begin after its padding's, so 24 of them hold 22 tokens."""
    tokenizer = small_tokenizers.words_with_bos()
    shape = RobertaConfig(vocab_size=110, max_position_embeddings=24, pad_token_id=1, **SMALL)
    return RobertaForSequenceClassification(shape), tokenizer, (102,), (), 22


def gpt2(pad):
    tokenizer = small_tokenizers.byte_level()
    shape = GPT2Config(vocab_size=512, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=3,
                       pad_token_id=pad, bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2ForSequenceClassification(shape), tokenizer, (), (), 32


KINDS = {"bert": bert, "roberta": roberta, "gpt2": lambda: gpt2(None), "gpt2 pad": lambda: gpt2(7)}


def saved(kind, folder, **changes):
    torch.manual_seed(2)
    model, tokenizer, *facts = KINDS[kind]()
    with torch.no_grad():  # larger weights than at initialisation: attention must matter
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8.0)
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, facts


def plainly(folder, facts, rows, most):
    """(rows, classes) by transformers, a text at a time, its last tokens cut out by hand."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, after, _ = facts
    room = most - len(before) - len(after)
    logits = []
    for text in rows:
        ids = tokenizer(text, add_special_tokens=False).input_ids[-room:]
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([[*before, *ids, *after]])).logits[0])
    return torch.stack(logits)


@pytest.mark.parametrize("scale", ["probability", "log_odds"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_classifier_scores_as_its_plain_forward(tmp_path, kind, scale):
    folder, facts = saved(kind, tmp_path / "m")
    rows = RAGGED
    if kind == "roberta":  # the words of its tokenizer
        rows = [re.sub(r"\w+", "w5", text) + f" w{i}" for i, text in enumerate(RAGGED)]
    p = plainly(folder, facts, rows, facts[-1]).softmax(-1)[:, 1]
    expected = p if scale == "probability" else (p / (1 - p)).log()
    score = scorer(tmp_path, "reward_fn=classifier", f"reward_fn.path={folder}",
                   "reward_fn.label=1", f"reward_fn.scale={scale}",
                   "reward_fn.batch_size=4")  # fmt: skip
    half = [Completed(text[:4], text[4:]) for text in rows]
    assert score(half) == pytest.approx(expected.tolist(), abs=1e-5)
    assert len({round(x, 4) for x in expected.tolist()}) == len(rows)  # they do differ


def test_the_end_of_a_long_text_is_kept(tmp_path):
    folder, facts = saved("bert", tmp_path / "m")
    p = plainly(folder, facts, RAGGED, 9).softmax(-1)[:, 2]
    score = scorer(tmp_path, "reward_fn=classifier", f"reward_fn.path={folder}",
                   "reward_fn.max_length=9")  # fmt: skip
    assert score(texts(*RAGGED)) == pytest.approx(p.tolist(), abs=1e-5)


def test_a_score_does_not_depend_on_the_batch(tmp_path):
    folder, _ = saved("gpt2", tmp_path / "m")
    words = ("reward_fn=classifier", f"reward_fn.path={folder}")
    rows = texts(*RAGGED, RAGGED[0], "")
    together, again = (scorer(tmp_path, *words, f"reward_fn.batch_size={n}")(rows) for n in (5, 1))
    assert together == pytest.approx(again, abs=1e-6)
    assert together[0] == together[6]  # no rounding between equals
    assert scorer(tmp_path, *words)([]) == []


def test_special_tokens_in_a_text_are_read_as_text(tmp_path):
    """Else a policy could end the text by writing the padding."""
    folder, _ = saved("gpt2", tmp_path / "m")
    score = scorer(tmp_path, "reward_fn=classifier", f"reward_fn.path={folder}")
    plain, ended = score(texts("the cat", "the cat<|endoftext|>"))
    assert abs(plain - ended) > 1e-3


def test_classes_that_exclude_nothing_get_a_sigmoid(tmp_path):
    folder, facts = saved("gpt2", tmp_path / "m", problem_type="multi_label_classification")
    expected = plainly(folder, facts, RAGGED, 32).sigmoid()[:, 2]
    score = scorer(tmp_path, "reward_fn=classifier", f"reward_fn.path={folder}")
    assert score(texts(*RAGGED)) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("names", "label", "index"),
    [
        (("NEGATIVE", "POSITIVE", "OTHER"), None, 1),
        (("very positive", "Positive", "bad"), None, 1),
        (("bad", "very positive", "x"), None, 1),
        (("a", "b", "c"), None, 2),
        (("a", "b", "c"), "b", 1),
        (("a", "A", "c"), "A", 1),
        (("a", "B", "c"), "b", 1),
        (("a", "b", "c"), "0", 0),
        (("a", "b", "c"), "'0'", 0),
        (("2", "b", "c"), "2", 0),
    ],
)
def test_the_class_by_name_or_index(tmp_path, names, label, index):
    folder, facts = saved("gpt2", tmp_path / "m", id2label=dict(enumerate(names)))
    words = [] if label is None else [f"reward_fn.label={label}"]
    session, said = session_of(tmp_path, "reward_fn=classifier", f"reward_fn.path={folder}", *words)
    p = plainly(folder, facts, RAGGED[:1], 32).softmax(-1)[0, index]
    assert load_scorer(session)(texts(RAGGED[0])) == [pytest.approx(float(p), abs=1e-6)]
    assert said == [f"reward_fn=classifier: probability of class {names[index]!r}"]


def test_the_small_sentiment_model_knows_good_from_bad(shared, tmp_path):
    path = shared / "data" / "models" / "imdb-sentiment-7m"
    if not path.is_dir():
        pytest.skip("no such model")
    score = scorer(tmp_path, "reward_fn=classifier", f"reward_fn.path={path}")
    good, bad = score(
        texts(" was wonderful, I loved it.", " was a dull waste.", prompt="This film")
    )
    assert good > 0.9
    assert bad < 0.1


def test_classifiers_that_cannot_be_used(tmp_path):
    folder, _ = saved("gpt2", tmp_path / "m")
    at = lambda path, *words: scorer(  # noqa: E731
        tmp_path, "reward_fn=classifier", f"reward_fn.path={path}", *words
    )
    with pytest.raises(
        ConfigError, match=r"^reward_fn\.label=9: no such class: use one of LABEL_0, L"
    ):
        at(folder, "reward_fn.label=9")
    shutil.copytree(folder, tmp_path / "policy")
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=8, n_embd=8, n_layer=1, n_head=1)
                    ).save_pretrained(tmp_path / "policy")  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"^reward_fn\.path=\S+: is a GPT2LMHeadModel, which cannot"
    ):
        at(tmp_path / "policy")
    shutil.copytree(folder, tmp_path / "one")
    GPT2ForSequenceClassification(
        GPT2Config(vocab_size=512, n_positions=8, n_embd=8, n_layer=1, n_head=1, num_labels=1)
    ).save_pretrained(tmp_path / "one")
    with pytest.raises(
        ConfigError, match=r"has a single score instead of classes: use reward_fn=reward_model"
    ):
        at(tmp_path / "one")
    bert_folder, _ = saved("bert", tmp_path / "bert")
    with pytest.raises(
        ConfigError,
        match=r"^reward_fn\.max_length=2: is too short for the tokenizer's special tokens",
    ):
        at(bert_folder, "reward_fn.max_length=2")
    with pytest.raises(
        ConfigError, match=r"cannot be loaded from the Hugging Face hub.*reward_fn\.path=<folder>"
    ):
        scorer(tmp_path, "reward_fn=classifier")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"^reward_fn\.path=\S+: has a config\.json but no \.s"):
        at(folder)


def test_scores_that_are_no_numbers_are_refused(tmp_path):
    folder, _ = saved("gpt2", tmp_path / "m")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    score = scorer(tmp_path, "reward_fn=classifier", f"reward_fn.path={folder}")
    with pytest.raises(NonFiniteError, match=r"^reward_fn: a score is not finite"):
        score(texts("the cat"))
