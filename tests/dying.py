"""The command line with ranks that kill themselves, once."""

from __future__ import annotations

import os
import sys

from lic_dist.app import cli
from tests.forked import die_at


def main(dying: str, step: str, *command: str) -> None:
    """Run `lic-dist COMMAND`; the ranks of `dying`, as 1 or 0,1, end instead of a step, unless started again."""
    if os.environ["RANK"] in dying.split(",") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_at(int(step))
    sys.argv = ["lic-dist", *command]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise
