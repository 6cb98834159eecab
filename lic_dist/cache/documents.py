"""Compare what an array's `zarr.json` says with what it must say; arrays grow, and never shrink."""

from __future__ import annotations

import json
import operator
from typing import Any

from zarr.core.metadata import ArrayV3Metadata


def same_array(found: Any, document: bytes) -> bool:
    """Return whether a parsed `zarr.json` describes the array of `document`, or what it has grown to; attributes may
    differ, and codecs that Zarr knows.
    """
    expected = json.loads(document)
    return _alike(found, expected) and all(map(operator.ge, found["shape"], expected["shape"]))


def grown_array(found: Any, document: bytes) -> bytes:
    """Return what a `zarr.json` must become to describe the array of `document`: itself with the larger shape, or where
    it is of another array, `document`.
    """
    expected = json.loads(document)
    if not _alike(found, expected):
        return document
    return json.dumps({**found, "shape": list(map(max, found["shape"], expected["shape"]))}, indent=2).encode()


def _alike(found: Any, expected: dict[str, Any]) -> bool:
    """Return whether a parsed `zarr.json` describes this array with fewer or more shards, or blocks of paths."""
    free = ("codecs", "attributes", "storage_transformers", "shape")
    if not isinstance(found, dict) or "codecs" not in found:
        return False
    if any(found.get(name) != value for name, value in expected.items() if name not in free):
        return False
    shape, chunk = found.get("shape"), expected["chunk_grid"]["configuration"]["chunk_shape"]
    grows = 2 if expected["dimension_names"][1:] == ["byte"] else 1
    if not isinstance(shape, list) or shape[grows:] != expected["shape"][grows:]:
        return False
    whole = all(isinstance(side, int) and side % of == 0 for side, of in zip(shape[:grows], chunk[:grows], strict=True))
    return whole and (found["codecs"] == expected["codecs"] or _opens(found))


def _opens(found: dict[str, Any]) -> bool:
    try:
        ArrayV3Metadata.from_dict(dict(found))
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    return True
