"""The command ``l2l-fast``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_NEEDED = ("typer", "rich", "matplotlib", "optuna")  # the extra `cli`


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; without the extra ``cli`` say how to get it. Ctrl-C exits with code 130."""
    try:
        from l2l_fast.cli.app import app

        app(args, prog_name="l2l-fast")
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        sys.exit(f"error: the command line needs {error.name}; pip install 'l2l_fast[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)
