"""Reddit TL;DR comparisons (CarperAI/openai_summarize_comparisons)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpo_cli.config import TldrDataConfig
from dpo_cli.data.adapters.columns import text
from dpo_cli.records import PreferenceExample

MARK = "TL;DR:"


def parse(row: dict[str, Any], index: int, config: TldrDataConfig) -> Iterable[PreferenceExample]:
    """A `TL;DR:` at the start of both summaries moves to the end of the prompt.

    That is the prompt SFT models were trained on, and the marker is not scored.
    """
    del config
    prompt, chosen, rejected = (text(row, f) for f in ("prompt", "chosen", "rejected"))
    pair = (chosen, rejected)
    if all(summary.lstrip().startswith(MARK) for summary in pair):
        pair = (chosen.lstrip()[len(MARK) :], rejected.lstrip()[len(MARK) :])
        prompt = prompt.rstrip()
        if not prompt.endswith(MARK):
            prompt = f"{prompt}\n{MARK}"
    yield PreferenceExample(prompt, pair, index)
