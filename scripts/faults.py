#!/usr/bin/env python
"""Inject every fault that dpo-run must survive: see `scripts/faults/`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.faults.main import main

if __name__ == "__main__":
    sys.exit(main())
