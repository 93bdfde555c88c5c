"""Which prompts a model was trained on: 8 bytes of each prompt's sha256, beside its weights.

final/trained_prompts.bin   little-endian, sorted, unique: of the run's training rows and of those
                            of the model it started from
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dpo_cli.records import Prompt

TRAINED_PROMPTS = "trained_prompts.bin"
KEYS = np.dtype("<u8")
PART = 2**20  # characters
_SPACE = re.compile(r"\s")


def prompt_text(prompt: Prompt) -> str:
    """The content of a prompt, the same for a text and for messages, without the space or line
    break that may separate it from its response."""
    text = prompt if isinstance(prompt, str) else "\n".join(str(m["content"]) for m in prompt)
    return text.replace("\r\n", "\n").strip()


def prompt_words(prompt: Prompt) -> str:
    """As `prompt_text`, with whitespace collapsed and Unicode normalized, to recognize a file that
    another program has saved."""
    text, parts, start = unicodedata.normalize("NFC", prompt_text(prompt)), [], 0
    while start < len(text):  # in parts: ten million words at once take a gigabyte
        space = _SPACE.search(text, start + PART)
        end = space.start() if space else len(text)
        parts.append(" ".join(text[start:end].split()))
        start = end
    return " ".join(filter(None, parts))


def prompt_key(prompt: Prompt) -> int:
    """The first 8 bytes of the sha256 of its words."""
    content = prompt_words(prompt).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def as_bytes(keys: Iterable[int], earlier: np.ndarray | None = None) -> bytes:
    """The file's content. earlier: the keys of the weights that training started from."""
    own = np.unique(np.array(sorted(set(keys)), KEYS))
    return (own if earlier is None else np.union1d(own, earlier)).astype(KEYS).tobytes()


def read(folder: Path) -> np.ndarray | None:
    """The sorted keys in a model's folder; None if it has none."""
    path = folder / TRAINED_PROMPTS
    if not path.is_file():
        return None
    content = path.read_bytes()
    return np.frombuffer(content[: len(content) // KEYS.itemsize * KEYS.itemsize], KEYS)


def shared(keys: Sequence[int], trained: np.ndarray) -> np.ndarray:
    """(len(keys),) whether each key is among the trained ones."""
    return np.isin(np.array(keys, KEYS), trained)
