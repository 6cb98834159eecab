"""The photos of a quick start: the embedded ones or a user's, split into training, held-out and test photos.

Photos are linked under their own names, not copied. Of a test photo that is too large to code quickly, the middle is
cut out and written as a PNG.
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

CROP = 256  # side of the cached crops, in pixels; smaller photos are passed over
FEWEST, MOST_TESTED = 4, 12  # usable photos needed, and test photos at most
TEST_LONG, TEST_SHORT = 1536, 1024  # sides of the largest picture that is coded, in pixels
PARTS = ("train", "held_out", "test")
EMBEDDED = Path(__file__).parent / "photos"


@dataclass(frozen=True)
class Split:
    """The photos of each part, as names relative to `source`; and the reason for each that was passed over."""

    source: Path
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    test: tuple[str, ...]
    passed_over: dict[str, str] = field(default_factory=dict)


def split(source: Path | None) -> Split:
    """Return the embedded photos in their fixed parts, or a folder's photos, split by their digests.

    A fifth of a user's photos are test photos, MOST_TESTED at most, and a sixth are held out. Photos that are added
    to the folder move few of the others to another part.

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
    rest = tests + math.ceil(len(names) / 6)
    return Split(source, names[rest:], names[tests:rest], names[:tests], passed_over)


def lay_out(parts: Split, out: Path) -> list[str]:
    """Link or cut the photos into out/photos/train, out/photos/held_out and out/test; return the names of those cut.

    Raises:
        LicError: a folder holds other photos already; nothing is ever removed.
    """
    cut = []
    for part in PARTS:
        names = getattr(parts, part)
        folder = out / "test" if part == "test" else out / "photos" / part
        files = {_name_in_part(parts, name): parts.source / name for name in names}
        placed = {
            _name_of_cut(name) if part == "test" and _too_large(file) else name: file for name, file in files.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        existing = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        existing = {name for name in existing if not any(map(photo_files.is_hidden, name.split("/")))}
        if unexpected := existing - set(placed):
            raise LicError(f"{folder} holds other photos, such as {min(unexpected)}", hint="give another --out")
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


def _name_in_part(parts: Split, name: str) -> str:
    """Return a photo's name in its part; an embedded photo's name begins with the part, which is removed."""
    return name.partition("/")[2] if parts.source == EMBEDDED else name


def _name_of_cut(name: str) -> str:
    return f"{name}.png"


def _too_large(file: Path) -> bool:
    size = images.measure(images.contents(file, str(file)), str(file))
    return max(size) > TEST_LONG or min(size) > TEST_SHORT


def _middle(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = photo.shape[:2]
    return images.middle(photo, *((TEST_SHORT, TEST_LONG) if width >= height else (TEST_LONG, TEST_SHORT)))
