"""Sheets of pictures side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lic_dist.reporting import sheets


def test_the_zoom_is_where_the_pictures_differ(tmp_path: Path) -> None:
    original = np.full((90, 120, 3), 100, np.uint8)
    coded = original.copy()
    coded[50:60, 80:95] = 180
    top, left = sheets.busiest_window([original, coded], 20, 20)
    assert 40 <= top <= 50 and 75 <= left <= 80
    assert sheets.busiest_window([original, coded], 90, 30)[0] == 0
    path = tmp_path / "sheet.png"
    sheets.comparison_sheet([sheets.Picture("original", "", original), sheets.Picture("SQ", "0.5 bpp", coded)], path)
    width, height = Image.open(path).size
    assert width > 900 and height > 600
    with pytest.raises(ValueError, match="one shape"):
        sheets.comparison_sheet([sheets.Picture("", "", original), sheets.Picture("", "", coded[:80])], path)
