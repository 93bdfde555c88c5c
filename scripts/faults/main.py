"""Inject every fault that dpo-run must survive, and print the outcomes as a table.

    python scripts/faults.py [--cases 1,2,14] [--kills 20] [--out FILE]

Exits with 1 if a case fails. All cases take up to an hour on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.common import markdown_row
from scripts.faults.cases import CASES, Case
from scripts.faults.lab import Failed, Lab

HEAD = "| # | case | required | seen | pass |\n|---|---|---|---|---|"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = {case.number: case for case in CASES}
    parser.add_argument("--cases", default=",".join(known), help="numbers, by comma; default: all")
    parser.add_argument("--kills", type=int, default=20, help="of each loop; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    args = parser.parse_args(argv)
    unknown = [name for name in args.cases.split(",") if name not in known]
    if unknown:
        parser.error(f"--cases: no {', '.join(unknown)}; there are {', '.join(known)}")
    if args.kills < 1:
        parser.error("--kills: at least 1")
    args.cases = [known[name] for name in args.cases.split(",")]
    return args


def row(case: Case, lab: Lab) -> tuple[str, bool]:
    """A line of the table, and whether the case passed."""
    start = time.monotonic()
    try:
        seen, passed = case.run(lab), True
    except Failed as failed:
        seen, passed = str(failed), False
    except Exception as error:  # noqa: BLE001 - an error in a row fails the row
        seen, passed = f"{type(error).__name__}: {error}", False
    elapsed = f"{time.monotonic() - start:.0f} s"
    seen = seen.replace(f"{lab.folder}/", "")
    verdict = "pass" if passed else "FAIL"
    seen = f"{seen} ({elapsed})"
    return markdown_row([case.number, case.name, case.required, seen, verdict]), passed


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="dpo-run-faults-") as scratch:
        lab = Lab((args.keep or Path(scratch)).resolve(), args.kills, args.seed)
        lab.selected = [case.number for case in args.cases]
        lines, failures = [HEAD], 0
        print(HEAD, flush=True)
        for case in args.cases:
            line, passed = row(case, lab)
            print(line, flush=True)
            lines.append(line)
            failures += not passed
    output = f"{len(args.cases) - failures} of {len(args.cases)} rows pass"
    print(f"\n{output}", flush=True)
    if args.out:
        args.out.write_text("\n".join([*lines, "", output, ""]), encoding="utf-8")
    return int(failures > 0)
