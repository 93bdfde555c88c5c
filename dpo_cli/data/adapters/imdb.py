"""IMDb reviews: the prompt is the first words of a review, the response the rest (for SFT)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from dpo_cli.config import ImdbDataConfig
from dpo_cli.data.adapters.columns import text
from dpo_cli.data.drops import BadRow
from dpo_cli.records import PreferenceExample


def parse(row: dict[str, Any], index: int, config: ImdbDataConfig) -> Iterable[PreferenceExample]:
    """Prompts of `min_prompt_words` to `max_prompt_words` words.

    The number is a hash of the review, so it does not depend on seed or order.
    """
    review = text(row, config.text_field).strip()
    low, high = config.min_prompt_words, config.max_prompt_words
    digest = hashlib.sha256(review.encode("utf-8", "surrogatepass")).digest()
    count = low + int.from_bytes(digest[:8], "little") % (high - low + 1)
    words = list(re.finditer(r"\S+", review))
    if len(words) <= count:
        raise BadRow(f"has {len(words)} words, but the prompt alone {count}", config.text_field)
    end = words[count - 1].end()
    yield PreferenceExample(review[:end], (review[end:],), index)
