"""The samples of a manifest: deterministic crops, in columns.

Crops are pure functions of (seed, photo digest, variation), and photos are held out by digest: the order of a folder,
the number of workers and the names of files change nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import posixpath
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lic_dist.data.manifest import ROWS, Manifest
from lic_dist.data.photo import SQUARE, Crop, Photo, least_side
from lic_dist.errors import UsageError


class Drawn(NamedTuple):
    """Columns of n samples: `photo` int32 [n], a row of the planned photos; `crop_y`, `crop_x` int32 [n] in pixels;
    `flip`, `held_out` bool [n].
    """

    photo: NDArray[np.int32]
    crop_y: NDArray[np.int32]
    crop_x: NDArray[np.int32]
    flip: NDArray[np.bool_]
    held_out: NDArray[np.bool_]


class Crops(Sequence[Crop]):
    """Samples in columns of equal length; `crops[i]` is a Crop, a slice a tuple of them.

    `paths` and `digests` are Arrow strings, one a planned photo, `held` is which of these are held out, bool; `places`
    are the photos' places, where they have any. Samples are drawn when they are first asked for: their number, and that
    of the held-out ones, do without.
    """

    def __init__(
        self,
        paths: pa.LargeStringArray,
        digests: pa.LargeStringArray,
        held: NDArray[np.bool_],
        variations: int,
        draw: Callable[[], Drawn],
        places: pa.LargeStringArray | None = None,
    ) -> None:
        self.paths, self.digests, self.places = paths, digests, places
        self.held, self.variations, self._draw = held, variations, draw

    @cached_property
    def drawn(self) -> Drawn:
        """The samples' own columns."""
        return self._draw()

    @property
    def photo(self) -> NDArray[np.int32]:
        return self.drawn.photo

    def __len__(self) -> int:
        return len(self.paths) * self.variations

    @overload
    def __getitem__(self, at: int) -> Crop: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Crop, ...]: ...
    def __getitem__(self, at: int | slice) -> Crop | tuple[Crop, ...]:
        if isinstance(at, slice):
            photo = self.photo[at]
            strings = (column.take(photo).to_pylist() for column in (self.paths, self.digests))
            numbers = (column[at].tolist() for column in self._numbers)
            places = [""] * len(photo) if self.places is None else self.places.take(photo).to_pylist()
            return tuple(map(Crop, *strings, *numbers, places))
        row = self.photo[at]  # IndexError ends a loop over a sequence
        source, digest = (column[int(row)].as_py() for column in (self.paths, self.digests))
        y, x, flip, held_out = (column[at].item() for column in self._numbers)
        return Crop(source, digest, y, x, flip, held_out, "" if self.places is None else self.places[int(row)].as_py())

    def __iter__(self) -> Iterator[Crop]:
        for first in range(0, len(self), ROWS):
            yield from self[first : first + ROWS]

    def __eq__(self, other: object) -> bool:
        """Compare with another sequence of Crop, in columns or not; of two in columns not the places."""
        if isinstance(other, Crops):
            numbers = zip(self._numbers, other._numbers, strict=True)
            return all(np.array_equal(mine, theirs) for mine, theirs in numbers) and self._strings() == other._strings()
        if isinstance(other, tuple | list):
            return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def located(self, manifest: Manifest) -> Crops:
        """Return the samples with the places at which a manifest of now has their photos, wherever these were."""
        table = manifest.table.filter(manifest.usable)
        now = table["place"] if "place" in table.schema.names else table["path"]
        rows = pc.index_in(self.digests, value_set=table["digest"].combine_chunks())
        places = pc.fill_null(now.combine_chunks().take(rows), "")
        return Crops(self.paths, self.digests, self.held, self.variations, partial(getattr, self, "drawn"), places)

    @property
    def num_held_out(self) -> int:
        """Number of samples in the held-out part; they come last."""
        return int(self.held.sum()) * self.variations

    @cached_property
    def longest_source(self) -> int:
        """Length in bytes of the longest source in UTF-8; 0 without samples."""
        return pc.max(pc.binary_length(self.paths)).as_py() or 0

    @property
    def _numbers(self) -> tuple[NDArray[Any], ...]:
        return self.drawn[1:]

    def _strings(self) -> list[Any]:
        return [column.take(self.photo) for column in (self.paths, self.digests)]


def plan_crops(
    manifest: Manifest, crop: int, variations: int, seed: int, held_out: float | str, squares: bool = False
) -> Crops:
    """Return the samples of a manifest: `variations` crops of each usable photo that is large enough.

    Training samples come first, in an order shuffled by the seed, then the held-out samples, so that any leading part
    of either is a fair sample of it. Copies of one photo (equal digests) count once, under the first path. With
    `squares` each four crops in a row are neighbours, in raster order.
    """
    width, height = manifest.column("width"), manifest.column("height")
    rows = np.flatnonzero(manifest.usable & (np.minimum(width, height) >= least_side(crop, squares)))
    copies = manifest.table["digest"].take(rows).combine_chunks().dictionary_encode().indices.to_numpy()
    rows = rows[np.unique(copies, return_index=True)[1]]
    digests, paths = (manifest.table[name].take(rows).combine_chunks() for name in ("digest", "path"))
    if isinstance(held_out, str):
        held = pc.starts_with(paths, _folder_prefix(held_out)).to_numpy(zero_copy_only=False)
    else:
        held = _uniforms("held out/", digests, ("",)) < held_out
    draw = partial(_draw, digests, held, height[rows], width[rows], crop, variations, seed, squares)
    places = manifest.table["place"].take(rows).combine_chunks() if "place" in manifest.table.schema.names else None
    return Crops(paths, digests, held, variations, draw, places)


def _draw(
    digests: pa.LargeStringArray,
    held: NDArray[np.bool_],
    height: NDArray[np.int32],
    width: NDArray[np.int32],
    crop: int,
    variations: int,
    seed: int,
    squares: bool = False,
) -> Drawn:
    """Return the columns of the samples of photos, in their order."""
    together = SQUARE**2 if squares else 1  # crops that share what is drawn
    sampled = tuple(f"/{variation // together}" for variation in range(variations))
    within = np.tile(np.arange(together), len(digests) * variations // together)
    side = least_side(crop, squares)

    def drawn(kind: str) -> NDArray[np.float64]:
        return _uniforms(f"{kind}/{seed}/", digests, sampled)

    photo, held_out = np.repeat(np.arange(len(digests), dtype=np.int32), variations), np.repeat(held, variations)
    order = np.lexsort((drawn("order"), held_out))
    return Drawn(
        photo[order],
        (within // SQUARE * crop + (drawn("y") * (height.astype(np.int64) - side + 1)[photo]).astype(np.int32))[order],
        (within % SQUARE * crop + (drawn("x") * (width.astype(np.int64) - side + 1)[photo]).astype(np.int32))[order],
        (drawn("flip") < 0.5)[order],
        held_out[order],
    )


def uniform(*key: object) -> float:
    """Return a number in [0, 1) that depends on the key alone: 53 bits of its sha256."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _uniforms(head: str, digests: pa.LargeStringArray, tails: tuple[str, ...]) -> NDArray[np.float64]:
    """Return `uniform` of every key head + digest + tail, the tails varying fastest: float64 [digests * tails]."""
    sha256, start, ends = hashlib.sha256, head.encode(), [tail.encode() for tail in tails]
    drawn = bytearray()
    for first in range(0, len(digests), ROWS):
        for digest in digests.slice(first, ROWS).to_pylist():
            begun = start + digest.encode()
            for end in ends:
                drawn += sha256(begun + end).digest()[:8]
    return (np.frombuffer(drawn, ">u8") >> np.uint64(11)) / 2**53


def is_held_out(photo: Photo, held_out: float | str) -> bool:
    """Return whether a photo belongs to the held-out part.

    A fraction chooses by the photo's digest alone, so that a photo is held out in every folder and job or in none. A
    name holds out the photos of that subfolder.
    """
    if isinstance(held_out, str):
        return photo.path.startswith(_folder_prefix(held_out))
    return uniform("held out", photo.digest) < held_out


def require_held_out(manifest: Manifest, held_out: float | str) -> None:
    """Refuse a held-out subfolder without photos.

    Raises:
        UsageError: there is no photo in it; the message names the subfolders that there are.
    """
    if not isinstance(held_out, str):
        return
    paths = manifest.table["path"]
    if pc.any(pc.starts_with(paths, _folder_prefix(held_out))).as_py():
        return
    there = sorted({folder for path in paths.to_pylist() for folder in _folders(path)})
    near = [one for one in there if one.lower() == posixpath.normpath(held_out).lower()]
    near = near or difflib.get_close_matches(held_out, there, n=1)
    listed = f"there are {', '.join(there[:20])}{' ...' * (len(there) > 20)}" if there else "there are no subfolders"
    raise UsageError(
        f"images.held_out: no photos in a subfolder '{held_out}'; {listed}",
        hint=f"did you mean '{near[0]}'?" if near else "a part of the photos is written 0.05 or 5%",
    )


def _folders(path: str) -> list[str]:
    """Return all folders above a photo, up to the scanned one, which is left out."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _folder_prefix(folder: str) -> str:
    """Return what the path of every photo in a subfolder starts with."""
    return f"{posixpath.normpath(folder)}/"
