"""Evaluation: real bitstreams of a folder of images, metrics, BD-rates, plots, the report and its page.

In: an `Experiment`, or result files. Out: a result file; `report.html`, `results.md`, plots. Imports what
`building` does, and `building`.
"""

from __future__ import annotations

import os
from pathlib import Path

from lic_dist.temporary import can_make, own_folder

# matplotlib, which several modules here import, warns in every process where it cannot keep its list of fonts.
_settings = Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
if "MPLCONFIGDIR" not in os.environ and not can_make(_settings) and (_folder := own_folder("matplotlib")):
    os.environ["MPLCONFIGDIR"] = str(_folder)
