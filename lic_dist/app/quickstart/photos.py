"""The photos of a quick start: the embedded ones or a user's, parted into training, held-out and test photos.

Nothing is copied but test photos that are too large to code in a first hour: of those the middle is cut out. Files keep
the names that their owner gave them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lic_dist.data import images, photo_files
from lic_dist.data.manifest import scan
from lic_dist.errors import LicError

CROP = 256  # pixels a side of what is cached: a photo must be as large
FEWEST, MOST_TESTED = 4, 12
TEST_LONG, TEST_SHORT = 1536, 1024  # pixels: the largest part of a test photo that is coded
PARTS = ("train", "held_out", "test")
EMBEDDED = Path(__file__).parent / "photos"


@dataclass(frozen=True)
class Split:
    """Photos of each part, by their names relative to the source; and those passed over, with the reason."""

    source: Path
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    test: tuple[str, ...]
    passed_over: dict[str, str] = field(default_factory=dict)


def split(source: Path | None) -> Split:
    """The embedded photos as they are parted, or a folder's, parted by digest: adding photos moves few of the others.

    A fifth of a user's photos are test photos, MOST_TESTED at most, and an eighth are held out.

    Raises:
        LicError: fewer than FEWEST photos can be used.
    """
    if source is None:
        train, held_out, test = (
            tuple(f"{part}/{name}" for name in photo_files.find(EMBEDDED / part)) for part in PARTS
        )
        return Split(EMBEDDED, train, held_out, test)
    passed_over: dict[str, str] = {}
    seen: dict[str, str] = {}
    usable = []
    for photo in scan(source):
        if photo.fault:
            passed_over[photo.path] = photo.fault
        elif min(photo.width, photo.height) < CROP:
            passed_over[photo.path] = f"{photo.width}x{photo.height}, smaller than {CROP}x{CROP}"
        elif photo.digest in seen:
            passed_over[photo.path] = f"the same file as {seen[photo.digest]}"
        else:
            seen[photo.digest] = photo.path
            usable.append(photo)
    if len(usable) < FEWEST:
        reasons = "".join(f"; {name}: {why}" for name, why in list(passed_over.items())[:3])
        raise LicError(
            f"{source} has {len(usable)} usable photos{reasons}",
            hint=f"give {FEWEST} or more of {CROP} pixels or larger; 40 or more say something",
        )
    names = tuple(photo.path for photo in sorted(usable, key=lambda photo: photo.digest))
    tests = min(MOST_TESTED, math.ceil(len(names) / 5))
    rest = tests + math.ceil(len(names) / 8)
    return Split(source, names[rest:], names[tests:rest], names[:tests], passed_over)


def lay_out(parts: Split, out: Path) -> list[str]:
    """Put the photos into out/photos/train, out/photos/held_out and out/test; the test photos that were cut.

    Raises:
        LicError: other photos lie there already; nothing is ever removed.
    """
    cut = []
    for part in PARTS:
        names = getattr(parts, part)
        folder = out / "test" if part == "test" else out / "photos" / part
        files = {_inside(parts, name): parts.source / name for name in names}
        placed = {
            _cut_name(name) if part == "test" and _too_large(file) else name: file for name, file in files.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        there = {name for name in there if not any(map(photo_files.is_hidden, name.split("/")))}
        if strange := there - set(placed):
            raise LicError(f"{folder} holds other photos, such as {min(strange)}", hint="give another --out")
        for name, file in placed.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            whole = name in files
            cut += [] if whole else [name]
            if target.is_symlink() or target.is_file():
                continue
            if whole:
                target.symlink_to(file.resolve())
            else:
                Image.fromarray(_middle(images.read(file))).save(target)
    return cut


def _inside(parts: Split, name: str) -> str:
    """The name in its folder: an embedded photo's without the part that it lies in already."""
    return name.partition("/")[2] if parts.source == EMBEDDED else name


def _cut_name(name: str) -> str:
    return f"{name}.png"


def _too_large(file: Path) -> bool:
    size = images.measure(images.contents(file, str(file)), str(file))
    return max(size) > TEST_LONG or min(size) > TEST_SHORT


def _middle(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = photo.shape[:2]
    return images.middle(photo, *((TEST_SHORT, TEST_LONG) if width >= height else (TEST_LONG, TEST_SHORT)))
