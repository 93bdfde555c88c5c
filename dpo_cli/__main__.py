"""`python -m dpo_cli` is `dpo-run`."""

import os
import sys

if __name__ == "__main__":
    if sys.path[:1] == [os.getcwd()]:  # torchrun's -m puts it there: its files are not ours
        del sys.path[0]
    from dpo_cli.cli import main

    main()
