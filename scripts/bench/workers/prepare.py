"""Create the input of all sides, as described in `plan.json`: a model folder, rows, token ids.

Runs in a separate process, so that the process that starts the measurements stays small.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.bench.lora import save_start
from scripts.bench.plan import Plan
from scripts.bench.shapes import draw_lengths, hf_config
from scripts.common import write_atomic

END, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"
SHARD = "2GB"  # of a weight file, and of the host memory for writing it
TRAINED_VOCAB = 32_000  # of the tokenizer trained on --data without --tokenizer


def prepare(plan: Plan) -> None:
    """Write the model folder, the initial adapter, `plan.rows` and, last, `plan.ids`."""
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
        raise SystemExit(f"{plan.data}: {len(encoded)} usable pairs, but {plan.pairs} are needed")
    write_lines(plan.ids, ({"prompt": e.prompt_ids.tolist(), "chosen": e.response_ids[0].tolist(),
                            "rejected": e.response_ids[1].tolist()} for e in encoded))  # fmt: skip


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its final name when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    partial.replace(folder)


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
    """One token per word, words `w3`, `w4`, ...: synthetic texts have exactly known lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [END, PAD, UNKNOWN, *(f"w{i}" for i in range(3, plan.shape.vocab))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(tokenizer, unk_token=UNKNOWN)


def trained_tokenizer(plan: Plan) -> Any:
    """A byte-level BPE trained on the texts of the file itself."""
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
    """Pairs of random words with frequencies as in text (Zipf's law)."""
    import numpy as np

    rng = np.random.default_rng(plan.seed)
    special = set(tokenizer.all_special_ids)
    words = [i for i in range(len(tokenizer)) if i not in special]
    weights = 1.0 / (np.arange(len(words)) + 2.7)
    weights /= weights.sum()
    for lengths in lengths_of(plan, rng).tolist():
        # a complete response ends with EOS, which is one of its tokens
        counts = (lengths[0], max(1, lengths[1] - 1), max(1, lengths[2] - 1))
        texts = [tokenizer.decode(rng.choice(words, n, p=weights)) for n in counts]
        yield dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))


def lengths_of(plan: Plan, rng: Any) -> Any:
    """(pairs, 3) tokens of prompt, chosen and rejected: as requested, else as in a dataset."""
    lengths = draw_lengths(plan.lengths, plan.pairs, rng)
    if plan.prompt_length is not None:
        lengths[:, 0] = plan.prompt_length
    if plan.response_length is not None:
        lengths[:, 1:] = plan.response_length
    return lengths


def real_rows(plan: Plan, tokenizer: Any) -> list[dict[str, Any]]:
    """A seeded sample of the file's rows that pass encoding, in the file's order."""
    from dpo_cli.data.sources import read_rows

    assert plan.data is not None
    usable = sorted({e.row for e in encode(plan, plan.data, tokenizer)})
    rows = read_rows(data_config(plan, plan.data), "train").rows
    picked = random.Random(plan.seed).sample(usable, min(plan.pairs, len(usable)))
    return [rows[i] for i in picked]


def data_config(plan: Plan, path: str) -> Any:
    from scripts.measuring import compose

    return compose(plan.data_overrides(path)).data


def encode(plan: Plan, path: str, tokenizer: Any) -> list[Any]:
    """Token ids as dpo-run computes them."""
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
        raise SystemExit(f"the tokenizer has {len(tokenizer)} tokens: raise --vocab to that")
    dtype = getattr(torch, plan.shape.stored)
    with torch.device(plan.device):
        if plan.reward_model:  # with a score head, so that both sides start from the same rewards
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
