"""The command line with ranks that kill themselves, once: dying.py RANKS STEP COMMAND..., RANKS as 1 or 0,1."""

from __future__ import annotations

import os
import signal
import sys

from lic_dist.app.cli import main
from lic_dist.training import loop

ranks, step = sys.argv[1].split(","), int(sys.argv[2])
del sys.argv[1:3]
take_step, taken = loop.take_step, 0


def dying(*arguments: object) -> object:
    global taken
    taken += 1
    if taken == step and os.environ["RANK"] in ranks and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(*arguments)


loop.take_step = dying

if __name__ == "__main__":
    main()
