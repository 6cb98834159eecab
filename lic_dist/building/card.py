"""A dataset card for a store: Markdown, with the YAML front matter that Hugging Face reads.

It says what the store holds (samples, photos, folders, crops, model, quantizers), licences as they are told, and which
photos look alike (data/likeness.py): near-duplicates among the store's own, and leaks, photos that look like a test
picture. These are looked for where the photos are at hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from lic_dist.cache.reader import LatentCache
from lic_dist.data.likeness import BITS, NEAR, hashes, near_pairs
from lic_dist.data.photo_files import printable
from lic_dist.data.source import PhotoSource
from lic_dist.errors import UsageError
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.text import counted

MOST_FOLDERS = 50  # folders that are listed
MOST_PAIRS = 200  # pairs that are listed of each kind
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
LARGER = "n>10M"


@dataclass(frozen=True)
class Alike:
    """Pairs of pictures that look alike, (one, other, differing bits), of so many that could be read.

    `leaks` are of a photo of the store and a test picture; without test pictures `tested` is None.
    """

    read: int
    duplicates: list[tuple[str, str, int]]
    leaks: list[tuple[str, str, int]]
    tested: int | None


def find_alike(cache: LatentCache, photos: PhotoSource, test: PhotoSource | None = None, near: int = NEAR) -> Alike:
    """Compare the store's photos, where they lie, with each other and with the test pictures.

    Raises:
        UsageError: none of the photos can be read there, or no test picture; test pictures in archives or tables.
        LicError: no such test folder, or no picture in it.
    """
    names, bits = hashes(photos, dict.fromkeys(sorted(_sources(cache))))
    if not names:
        raise UsageError(
            f"no photo of {cache.storage} can be read in {photos.where}", hint="images.path: where they are now"
        )
    duplicates = [(names[one], names[other], differing) for one, other, differing in near_pairs(bits, near=near)]
    if test is None:
        return Alike(len(names), duplicates, [], None)
    if test.packed:
        raise UsageError(f"{test.where} holds pictures packed", hint="unpack them to a folder")
    tests, test_bits = hashes(test, test.search().names)
    if not tests:
        raise UsageError(f"no picture in {test.where} can be read", hint="give the folder of the test pictures")
    leaks = [(names[one], tests[other], differing) for one, other, differing in near_pairs(bits, test_bits, near)]
    return Alike(len(names), duplicates, leaks, len(tests))


def card(
    cache: LatentCache, licences: Sequence[str] = (), alike: Alike | None = None, title: str = "", near: int = NEAR
) -> str:
    """Return the card of a snapshot of a store."""
    front: dict[str, Any] = {
        **({"license": licences[0] if len(licences) == 1 else list(licences)} if licences else {}),
        "pretty_name": title or "latents of photos",
        "tags": ["image-compression", "learned-image-compression", "latents", "zarr", "lic_dist"],
        "size_categories": [next((name for most, name in SIZES if cache.num_samples < most), LARGER)],
    }
    parts = [f"# {front['pretty_name']}", _contents(cache, licences), _folders(cache), _model(cache), _groups(cache)]
    parts.append(
        _alike(alike, near) if alike else "## Photos that look alike\n\nNot looked for: no photos were at hand."
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(parts) + "\n"


def _sources(cache: LatentCache) -> Mapping[str, int]:
    """Return the photos of the samples that can be used, each with the number of these."""
    return Counter(cache.samples["source"][cache.usable].tolist())


def _contents(cache: LatentCache, licences: Sequence[str]) -> str:
    usable, held_out, crop = cache.usable, cache.samples["held_out"], cache.geometry.crop
    rows = [
        ("samples that can be used", f"{int(usable.sum())} of {cache.num_samples}"),
        ("of these, held out", str(int((usable & held_out).sum()))),
        ("photos", str(len(_sources(cache)))),
        ("crops", f"{crop}x{crop} pixels"),
        ("latents", f"y {cache.geometry.y_channels} x {cache.geometry.y_size}x{cache.geometry.y_size}, "
         f"{'kept' if cache.header.store_y else 'not kept'}; z {cache.geometry.z_channels} x "
         f"{cache.geometry.z_size}x{cache.geometry.z_size}"),
        ("licences of the photos", ", ".join(licences) or "not told"),
        ("snapshot", f"{cache.header.snapshot}, `{cache.header.digest}`"),
        ("fingerprint", f"`{cache.fingerprint}`"),
    ]  # fmt: skip
    return (
        "Photos in crops, the latents that the frozen encoder of a learned image codec makes of them, and the integers "
        "that quantizers chose: a cache of lic_dist, plain Zarr v3.\n\n" + _table(("", ""), rows)
    )


def _folders(cache: LatentCache) -> str:
    counts: Counter[str] = Counter()
    photos: Counter[str] = Counter()
    for source, samples in _sources(cache).items():
        folder = printable(source.rpartition("/")[0] or ".")
        counts[folder] += samples
        photos[folder] += 1
    rows = [(folder, str(photos[folder]), str(number)) for folder, number in counts.most_common(MOST_FOLDERS)]
    more = len(counts) - len(rows)
    return "## Folders\n\n" + _table(("folder", "photos", "samples"), rows) + (f"\n\nand {more} more" if more else "")


def _model(cache: LatentCache) -> str:
    rows = [(name, str(value)) for name, value in cache.identity["model"].items()]
    return "## Model\n\n" + _table(("", ""), rows)


def _groups(cache: LatentCache) -> str:
    rows = []
    for group in cache.groups:
        record = QuantizerRecord.from_json(cache.record_json(group))
        bits = cache.column(f"quantized/{group}/bits", cache.written(group))
        bpp = f"{np.median(bits[bits > 0]) / cache.geometry.crop**2:.4f}" if (bits > 0).any() else ""
        figures = (f"{value:.4g}" for value in (record.lmbda, record.step, record.lambda_scale, record.shift))
        rows.append((group, record.name, *figures, bpp, f"`{record.digest[:12]}`"))
    header = ("group", "quantizer", "lambda", "step", "strength", "shift", "median bpp", "record")
    return "## Quantizers\n\n" + (_table(header, rows) if rows else "None.")


def _alike(found: Alike, near: int) -> str:
    how = (
        f"By a difference hash of {BITS} bits of {counted(found.read, 'photo')} that could be read; a pair differs in "
        f"at most {near} bits. Other sizes and JPEG are found; mirrored, turned or cropped pictures are not."
    )
    leaks = "Not looked for: no test folder was given."
    if found.tested is not None:
        leaks = _pairs(found.leaks, ("photo", "test picture"), f"of {counted(found.tested, 'test picture')}")
    duplicates = _pairs(found.duplicates, ("photo", "photo"), "")
    return (
        f"## Photos that look alike\n\n{how}\n\n### Near-duplicates\n\n{duplicates}"
        f"\n\n### Leaks of test pictures\n\n{leaks}"
    )


def _pairs(pairs: Sequence[tuple[str, str, int]], names: tuple[str, str], of: str) -> str:
    if not pairs:
        return f"None {of}".rstrip() + "."
    rows = [(printable(one), printable(other), str(differing)) for one, other, differing in pairs[:MOST_PAIRS]]
    more = f"\n\nand {len(pairs) - len(rows)} more" if len(pairs) > len(rows) else ""
    return f"{counted(len(pairs), 'pair')} {of}".rstrip() + ".\n\n" + _table((*names, "bits"), rows) + more


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(text: str) -> str:
    """Names from files: no HTML, no cell's end."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
