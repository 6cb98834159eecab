"""The command line with ranks that kill themselves, once: dying.py RANKS STEP COMMAND..., RANKS as 1 or 0,1."""

from __future__ import annotations

import os
import sys

from lic_dist.app.cli import main
from tests.forked import die_at

if __name__ == "__main__":
    dying, step = sys.argv[1].split(","), int(sys.argv[2])
    del sys.argv[1:3]
    if os.environ["RANK"] in dying and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        die_at(step)
    main()
