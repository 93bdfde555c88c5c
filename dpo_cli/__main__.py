"""`python -m dpo_cli` is `dpo-run`."""

from dpo_cli.cli import main

if __name__ == "__main__":
    main()
