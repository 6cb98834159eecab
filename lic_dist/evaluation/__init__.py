"""Rate-distortion runs, BD-rate, plots and reports."""

from __future__ import annotations

import os
from pathlib import Path

from lic_dist.temporary import can_make, own_folder

# matplotlib, which several modules here import, warns in every process where it cannot keep its list of fonts.
_settings = Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
if "MPLCONFIGDIR" not in os.environ and not can_make(_settings) and (_folder := own_folder("matplotlib")):
    os.environ["MPLCONFIGDIR"] = str(_folder)
