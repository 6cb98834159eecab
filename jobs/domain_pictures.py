#!/usr/bin/env python
"""Make the pictures of two domains by headless Chromium: pages of documentation, and frames of a block world.

    mkdocs build -d runs/site
    python jobs/domain_pictures.py screens runs/domains --pages runs/site
    python jobs/domain_pictures.py frames runs/domains               # by jobs/block_world.html

They are of 512x512 pixels: OUT/screens/train, OUT/screens/valid and, to test on, OUT/screens-test.

Pages are dealt into the parts by their names, each drawn in a width, a scale and a scheme of its own. Each part of the
frames has its own worlds: terrain, colours, light and weather follow from a number. Nothing but what the pages need is
drawn, and nothing is fetched.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

PARTS = {"train": 32, "valid": 6, "test": 12}
SIDE = 512
SHEET = 4  # frames a side of what one start of the browser draws
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Write the parts of one domain as PNG; print the number of pictures of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("domain", choices=("screens", "frames"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--pages", type=Path, help="of screens: a folder of HTML")
    parser.add_argument("--pictures", type=int, help="of each part, instead of 32, 6 and 12")
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="this part alone; may be repeated")
    arguments = parser.parse_args()
    if arguments.domain == "screens" and arguments.pages is None:
        parser.error("screens are of --pages")
    for part in arguments.part or PARTS:
        count = arguments.pictures or PARTS[part]
        made = frames(part, count) if arguments.domain == "frames" else screens(part, count, arguments.pages)
        out = arguments.out / (f"{arguments.domain}-test" if part == "test" else f"{arguments.domain}/{part}")
        out.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(made):
            picture.save(out / f"{arguments.domain}-{number:02}.png")
        print(f"{len(list(out.glob('*.png')))} pictures in {out}")


def screens(part: str, count: int, pages: Path) -> Iterator[Image.Image]:
    """Yield so many squares of pages of a part, in turn one of each page, none of them nearly empty."""
    found = sorted(pages.rglob("*.html"), key=lambda page: random.Random(str(page.relative_to(pages))).random())
    shares = np.cumsum([0, *PARTS.values()]) / sum(PARTS.values()) * len(found)
    first, last = (round(shares[list(PARTS).index(part) + one]) for one in (0, 1))
    squares: dict[Path, Iterator[Image.Image]] = {page: _squares_of(page) for page in found[first:last]}
    while count and squares:
        for page in list(squares):
            square = next(squares[page], None)
            if square is None:
                del squares[page]
            elif count:
                count -= 1
                yield square


def _squares_of(page: Path) -> Iterator[Image.Image]:
    """Yield squares of a page from the top down, whose luma varies enough to hold text or a picture."""
    chosen = random.Random(page.parent.name + page.name)
    scale, wide = chosen.choice((1, 1, 1.25, 1.5, 2)), chosen.choice((640, 800, 1024, 1280))
    scheme = f"--blink-settings=preferredColorScheme={chosen.choice((0, 1, 1))}"  # dark, light
    sheet = _drawn(page.resolve().as_uri(), wide, 4096, f"--force-device-scale-factor={scale:g}", scheme)
    left = chosen.randrange(sheet.width - SIDE + 1)
    for top in range(0, sheet.height - SIDE + 1, SIDE):
        square = sheet.crop((left, top, left + SIDE, top + SIDE))
        if np.asarray(square.convert("L"), np.float32).std() > 12:
            yield square


def frames(part: str, count: int) -> Iterator[Image.Image]:
    """Yield so many frames of worlds of a part."""
    page, software = (
        Path(__file__).with_name("block_world.html"),
        ("--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    )
    for start in range(0, count, SHEET**2):
        world = 10_000 * list(PARTS).index(part) + start
        drawn = min(SHEET**2, count - start)
        sheet = _drawn(f"{page.resolve().as_uri()}#{world},{drawn}", SHEET * SIDE, SHEET * SIDE, *software)
        for number in range(drawn):
            left, top = number % SHEET * SIDE, number // SHEET * SIDE
            yield sheet.crop((left, top, left + SIDE, top + SIDE))


def _drawn(url: str, wide: int, high: int, *options: str) -> Image.Image:
    """Return what headless Chromium draws of a page in a window of so many pixels of CSS."""
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        raise SystemExit(f"there is no browser: one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sheet.png"
        command = [program, "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
        command += [f"--window-size={wide},{high}", f"--screenshot={file}", *options, url]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        return Image.open(file).convert("RGB")


if __name__ == "__main__":
    main()
