"""What pages are made of: the files of `page/`, and what a page's policy says of a script."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources


def asset(name: str) -> str:
    """Return the text of a file of `page/`."""
    return (resources.files("lic_dist.reporting") / "page" / name).read_text("utf-8")


def as_json(data: object) -> str:
    """Return data as JSON that cannot end its element of a page."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def script_source(script: str) -> str:
    """Return the source of a Content-Security-Policy that allows this script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
