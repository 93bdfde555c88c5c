"""The environment a command needs: UTF-8 in any locale, and a home folder."""

from __future__ import annotations

import atexit
import locale
import os
import shutil
import sys
import tempfile


def restart_in_utf8() -> None:
    """Restart the command in Python's UTF-8 mode if the locale has another encoding.

    Explicit encodings are not enough: libraries open files too, and `é.jsonl` could not be named.
    Output keeps the locale's encoding, which the terminal expects.
    """
    encoding = locale.getencoding()
    if sys.flags.utf8_mode or encoding.lower().replace("-", "") == "utf8":
        return
    os.environ["PYTHONUTF8"] = "1"  # of ranks, sweeps and recipes as well
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def ensure_home() -> None:
    """Give users without a home folder a temporary one for the duration of the command.

    Otherwise this program and its libraries would create a folder named `~` in the current one.
    """
    if os.environ.get("HOME") == "" or not os.path.isabs(os.path.expanduser("~")):
        os.environ["HOME"] = tempfile.mkdtemp(prefix="dpo-run-home-")
        atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
