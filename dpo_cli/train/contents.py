"""The content of a checkpoint or model folder: collected between steps, written later.

Tensors alias the run's until `copied()`; only copies may be written while training continues.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from dpo_cli.durable import disk_errors
from dpo_cli.durable.provenance import PROVENANCE
from dpo_cli.durable.redact import redact
from dpo_cli.durable.tensors import write_tensors

CARRIED = "carried.safetensors"
HEADS = "heads.safetensors"
OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_SHARD = "50GB"  # per file of weights, transformers' default

Texts = Mapping[str, bytes]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Contents:
    """Files by name: the bytes of text files and the tensors of safetensors files.

    model: whose weights are in `WEIGHTS`, under their names in memory; transformers may store
    them under other names, or split and merged.
    """

    texts: Texts = field(default_factory=dict)
    tensors: Mapping[str, Tensors] = field(default_factory=dict)
    model: PreTrainedModel | None = None

    def __or__(self, other: Contents) -> Contents:
        texts, tensors = {**self.texts, **other.texts}, {**self.tensors, **other.tensors}
        return Contents(texts, tensors, self.model or other.model)

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(
            value.numel() * value.element_size()
            for values in self.tensors.values()
            for value in values.values()
        )

    def copied(self, copy: Callable[[Tensor], Tensor]) -> Contents:
        """The same contents with `copy` applied to each tensor."""
        copies = {
            file: {name: copy(value) for name, value in values.items()}
            for file, values in self.tensors.items()
        }
        return replace(self, tensors=copies)

    def write(self, folder: Path) -> dict[str, dict[str, str | int]]:
        """Write into an existing folder. Returns sha256 and bytes of the safetensors files."""
        written = {}
        for name, text in self.texts.items():
            if "/" in name:  # a tokenizer with several chat templates
                (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(text)
        for file, values in self.tensors.items():
            is_model = file == WEIGHTS and self.model is not None
            parts = self._weight_files(folder, dict(values)) if is_model else {file: values}
            facts = None if file in (OPTIMIZER, RNG, HEADS) else {"format": "pt"}
            for part, content in parts.items():
                written[part] = write_tensors(folder / part, content, facts)
        return written

    def _weight_files(self, folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensors]:
        """Weights named and split as by `save_pretrained`; writes the index of several files."""
        assert self.model is not None
        stored = revert_weight_conversion(self.model, weights)
        split = split_torch_state_dict_into_shards(
            stored, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD
        )
        if split.is_sharded:
            total = {"total_parameters": self.model.num_parameters(), **split.metadata}
            index = {"metadata": total, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / WEIGHTS_INDEX).write_text(text, encoding="utf-8")
        return {
            file: {name: stored[name] for name in names}
            for file, names in split.filename_to_tensors.items()
        }


def of_model(
    model: PreTrainedModel,
    tokenizer: Texts,
    provenance: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
) -> Contents:
    """Weights, config, tokenizer and provenance in Hugging Face layout; of a model with an adapter,
    the adapter in PEFT's layout. weights: the state dict, required if the model is sharded."""
    texts = {**tokenizer, PROVENANCE: json.dumps(redact(provenance), indent=1).encode()}
    adapter_files = getattr(model, "adapter_files", None)  # see model/adapters/lora.py
    if adapter_files is not None:
        tensors, own = adapter_files(weights)
        return Contents({**texts, **own}, tensors)
    if weights is None:
        weights = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
    weights = {k: v for k, v in weights.items() if k not in (model._keys_to_ignore_on_save or ())}
    # With an empty state dict it writes only the configuration files.
    own = _written(lambda folder: model.save_pretrained(folder, state_dict={}))
    return Contents({**texts, **own}, {WEIGHTS: weights}, model)


def of_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Texts:
    """The tokenizer's files. It must not be in use by another thread meanwhile."""
    return _written(tokenizer.save_pretrained)


def _written(save: Callable[[str], object]) -> Texts:
    """The files that a library can only write to disk, by name."""
    scratch = Path(tempfile.gettempdir())
    with disk_errors(scratch / "dpo-run"), tempfile.TemporaryDirectory(prefix="dpo-run-") as folder:
        save(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def of_training(
    optimizer: Optimizer, heads: torch.nn.Module | None, state: dict[str, Any]
) -> Contents:
    """Training state: the optimizer's, heads, random generators, and `state` as JSON."""
    files = of_optimizer(optimizer) | of_generators(state)
    return files if heads is None else files | Contents({}, {HEADS: heads.state_dict()})


def of_optimizer(optimizer: Optimizer) -> Contents:
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, value in _leaves(packed["state"], ""):
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
        else:
            scalars[name] = value
    body = {"param_groups": packed["param_groups"], "scalars": scalars}
    return Contents({"optimizer.json": json.dumps(body).encode()}, {OPTIMIZER: tensors})


def _leaves(node: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """`3/exp_avg` -> tensor; 8-bit optimizers nest one level deeper and share tables."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def of_generators(state: dict[str, Any]) -> Contents:
    """The current states of the random generators, and `state`."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    states["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, gauss = random.getstate()
    other = {
        "python": [version, list(words), gauss],
        "numpy": [kind, int(position), int(has_gauss), float(cached)],
    }
    texts = {"rng.json": json.dumps(other), "state.json": json.dumps(state, indent=1)}
    return Contents({name: text.encode() for name, text in texts.items()}, {RNG: states})
