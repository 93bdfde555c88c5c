"""Makes what both sides of `bench.py` read: a model folder, rows, and the rows as token ids.

Usage: `python bench_prepare.py plan.json`

Runs as a process of its own, so that the one that starts the measurements stays small.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_lengths
from bench_job import write_whole
from bench_lora import save_start
from bench_shapes import Shape, hf_config

END, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
SHARD = "2GB"  # of a file of weights; memory of the host that writing them takes
TRAINED_VOCAB = 32_000  # of the tokenizer that is trained on --data where none is given


@dataclass(frozen=True)
class Plan:
    """What to make in `folder`; an existing model there is kept.

    data: a file of real pairs, read by `adapter`; None: synthetic pairs, whose lengths are
    `prompt_length` and `response_length` (EOS included) or, where None, drawn as in the dataset
    that `lengths` names.
    context: positions of the model. length: tokens of prompt and response that are kept.
    reward_model: a sequence classifier of one label instead of a language model. r: rank of an
    adapter to start from, made beside the model. device: where random weights are drawn.
    """

    folder: str
    shape: Shape
    context: int
    pairs: int
    length: int
    seed: int
    data: str | None = None
    adapter: str = "jsonl"
    tokenizer: str | None = None
    prompt_length: int | None = None
    response_length: int | None = None
    reward_model: bool = False
    r: int | None = None
    device: str = "cpu"
    lengths: str = "hh"

    @property
    def model(self) -> Path:
        return Path(self.folder) / "model"

    @property
    def ids(self) -> Path:
        return Path(self.folder) / f"ids-{self.shape_of_rows}.jsonl"

    @property
    def rows(self) -> Path:
        return Path(self.folder) / f"rows-{self.shape_of_rows}.jsonl"

    @property
    def shape_of_rows(self) -> str:
        return f"{self.lengths}-{self.pairs}x{self.prompt_length}-{self.length}"

    @property
    def adapter_start(self) -> Path:
        return Path(self.folder) / f"adapter-r{self.r}"

    def data_overrides(self, path: str) -> list[str]:
        """How `dpo-run` reads the pairs: in the file's order, none held out."""
        return [
            f"data={self.adapter}", f"data.path={path}", "data.eval_rows=0",
            "data.eval_split=null", f"data.max_length={self.length}",
            f"data.max_prompt_length={max(1, self.length // 2)}",
        ]  # fmt: skip

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Plan:
        values = json.loads(path.read_text())
        return cls(**values | {"shape": Shape(**values["shape"])})


def prepare(plan: Plan) -> None:
    """Write the model folder, the adapter to start from, `plan.rows` and, last, `plan.ids`."""
    if plan.data is None:
        tokenizer = load_folder(plan.tokenizer) if plan.tokenizer else word_tokenizer(plan)
        write_lines(plan.rows, synthetic_rows(plan, tokenizer))
    else:
        tokenizer = load_folder(plan.tokenizer) if plan.tokenizer else trained_tokenizer(plan)
        write_lines(plan.rows, real_rows(plan, tokenizer))
    if not (plan.model / "config.json").is_file():
        with publishing(plan.model) as folder:
            save_model(plan, tokenizer, folder)
    if plan.r is not None and not plan.adapter_start.is_dir():
        with publishing(plan.adapter_start) as folder:
            save_start(str(plan.model), plan.r, folder)
    encoded = encode(plan, str(plan.rows), tokenizer)
    if len(encoded) < plan.pairs:
        raise SystemExit(f"{plan.data}: {len(encoded)} pairs can be used, {plan.pairs} are needed")
    write_lines(plan.ids, ({"prompt": e.prompt_ids.tolist(), "chosen": e.response_ids[0].tolist(),
                            "rejected": e.response_ids[1].tolist()} for e in encoded))  # fmt: skip


def write_lines(path: Path, rows: Sequence[Any] | Iterator[Any]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is full."""
    half = folder.with_name(f"{folder.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    yield half
    half.replace(folder)


def load_folder(folder: str) -> Any:
    from dpo_cli.config import ModelConfig
    from dpo_cli.model.load import load_tokenizer

    return load_tokenizer(ModelConfig(tokenizer=folder))


def wrap(tokenizer: Any, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, **special
    )


def word_tokenizer(plan: Plan) -> Any:
    """One token a word, words `w3`, `w4`, ...: synthetic texts have exactly known lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [END, PAD, UNKNOWN, *(f"w{i}" for i in range(3, plan.shape.vocab))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(tokenizer, unk_token=UNKNOWN)


def trained_tokenizer(plan: Plan) -> Any:
    """A byte-level BPE learned from the texts of the file itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(plan.shape.vocab, TRAINED_VOCAB),
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts_of(plan), trainer)
    return wrap(tokenizer)


def texts_of(plan: Plan) -> Iterator[str]:
    from dpo_cli.data.dataset import load_splits

    assert plan.data is not None
    for example in load_splits(data_config(plan, plan.data), plan.seed).train:
        prompt = example.prompt
        yield from [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
        yield from example.responses


def synthetic_rows(plan: Plan, tokenizer: Any) -> Iterator[dict[str, str]]:
    """Pairs of random words, common ones more often, as in text (Zipf's law)."""
    import numpy as np

    rng = np.random.default_rng(plan.seed)
    special = set(tokenizer.all_special_ids)
    words = [i for i in range(len(tokenizer)) if i not in special]
    weights = 1.0 / (np.arange(len(words)) + 2.7)
    weights /= weights.sum()
    for lengths in draw_lengths(plan, rng):
        # a complete response ends with EOS, which is one of its tokens
        counts = (lengths[0], max(1, lengths[1] - 1), max(1, lengths[2] - 1))
        texts = [tokenizer.decode(rng.choice(words, n, p=weights)) for n in counts]
        yield dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))


def draw_lengths(plan: Plan, rng: Any) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected: as asked for, else as in a dataset."""
    lengths = bench_lengths.draw(plan.lengths, plan.pairs, rng)
    if plan.prompt_length is not None:
        lengths[:, 0] = plan.prompt_length
    if plan.response_length is not None:
        lengths[:, 1:] = plan.response_length
    return [(int(a), int(b), int(c)) for a, b, c in lengths]


def real_rows(plan: Plan, tokenizer: Any) -> list[dict[str, Any]]:
    """A seeded sample of the file's rows that survive encoding, as they stand in the file."""
    from dpo_cli.data.sources import read_rows

    assert plan.data is not None
    usable = sorted({e.row for e in encode(plan, plan.data, tokenizer)})
    rows = read_rows(data_config(plan, plan.data), "train").rows
    picked = random.Random(plan.seed).sample(usable, min(plan.pairs, len(usable)))
    return [rows[i] for i in picked]


def data_config(plan: Plan, path: str) -> Any:
    from bench_ours import compose

    return compose(plan.data_overrides(path)).data


def encode(plan: Plan, path: str, tokenizer: Any) -> list[Any]:
    """Token ids as the product makes them."""
    from dpo_cli.data.dataset import load_encoded

    return load_encoded(data_config(plan, path), tokenizer, plan.context, plan.seed, None).train


def save_model(plan: Plan, tokenizer: Any, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(plan.seed)
    config = hf_config(
        plan.shape, plan.context, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(f"the tokenizer has {len(tokenizer)} tokens: give --vocab at least that")
    dtype = getattr(torch, plan.shape.stored)
    with torch.device(plan.device):
        if plan.reward_model:  # with its head, so that both sides start from the same rewards
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
            torch.nn.init.normal_(model.score.weight, std=(plan.shape.width + 1) ** -0.5)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)


def main() -> None:
    from dpo_cli.errors import UserError

    try:
        prepare(Plan.load(Path(sys.argv[1])))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
