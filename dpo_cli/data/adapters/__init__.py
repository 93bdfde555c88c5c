"""Dataset adapters, one file per dataset: how a raw row becomes examples.

An adapter is a pure function `parse(row, index, config) -> iterable of PreferenceExample` that
raises `BadRow` for a row it cannot use. Blank, repeated or invalid responses are dropped afterwards
for every dataset by `adapt.adapt`. To add a dataset: a file here, a line in `ADAPTERS`, a dataclass
in `config/datasets.py`, `conf/data/<name>.yaml`.

`sentiment` is not in the table, as its rows are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dpo_cli.data.adapters import hh, imdb, jsonl, se, shp, tldr, ultrafeedback
from dpo_cli.records import PreferenceExample

Adapter = Callable[[dict[str, Any], int, Any], Iterable[PreferenceExample]]

ADAPTERS: dict[str, Adapter] = {
    "hh": hh.parse,
    "shp": shp.parse,
    "se": se.parse,
    "tldr": tldr.parse,
    "imdb": imdb.parse,
    "ultrafeedback": ultrafeedback.parse,
    "jsonl": jsonl.parse,
}
