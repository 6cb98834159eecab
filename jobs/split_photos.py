#!/usr/bin/env python
"""Deal a folder of photos into parts by their bytes, so that a photo is always in the same part.

    python jobs/split_photos.py all/ . base=0.6 photos=0.25 test=0.15      # links in base/, photos/ and test/

The first 32 bits of a file's SHA-256, as a fraction, say where in these shares it falls. Names and subfolders are kept;
the links are symbolic.
"""

from __future__ import annotations

import argparse
import hashlib
from itertools import accumulate
from pathlib import Path

from lic_dist.data.photo_files import find


def main() -> None:
    """Link each photo of a folder into one part; print the number of photos of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="+", help="NAME=SHARE; the shares sum to 1")
    arguments = parser.parse_args()
    names, shares = zip(*(part.split("=") for part in arguments.parts), strict=True)
    ends = list(accumulate(map(float, shares)))
    if abs(ends[-1] - 1) > 1e-9:
        parser.error(f"the shares sum to {ends[-1]:g}, not 1")
    counts = dict.fromkeys(names, 0)
    for photo in find(arguments.photos):
        source = (arguments.photos / photo).resolve()
        place = int(hashlib.sha256(source.read_bytes()).hexdigest()[:8], 16) / 2**32
        part = next((name for name, end in zip(names, ends, strict=True) if place < end), names[-1])
        target = arguments.out / part / photo
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(source)
        counts[part] += 1
    print(", ".join(f"{count} photos in {arguments.out / part}" for part, count in counts.items()))


if __name__ == "__main__":
    main()
