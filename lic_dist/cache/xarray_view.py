"""A cache as one `xarray.Dataset`; each array is read when it is indexed, through the reader and with its errors.

Variables keep the store's names ("pixels", "latents/y", "quantized/<group>/k" ...). What is known of the samples
("source", "digest", "crop_y", "crop_x", "flip", "held_out", "status") becomes coordinates along `sample`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lic_dist.cache.plan import canonical_json
from lic_dist.errors import UsageError

try:
    import xarray
    from xarray.backends import BackendArray
    from xarray.core import indexing
except ImportError:
    raise UsageError("this needs the package xarray", hint="pip install xarray") from None

if TYPE_CHECKING:
    from lic_dist.cache.shard_reader import ShardReader

DIMENSIONS = {  # of arrays whose rows and columns are not those of y
    "pixels": ("sample", "color", "pixel_row", "pixel_column"),
    "latents/z": ("sample", "z_channel", "z_row", "z_column"),
}
SAMPLES_IN_COORDINATES = ("samples/status",)


class _LazyArray(BackendArray):
    """One array of a cache, cut to its rows; an index reads only the shards that it touches."""

    def __init__(self, cache: ShardReader, name: str) -> None:
        self.cache, self.name = cache, name
        array = cache.array(name)
        self.shape, self.dtype = (len(cache), *array.shape[1:]), array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read_outer)

    def _read_outer(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """Return rows by an integer, a slice or an array of integers; then each further axis by its own index."""
        plain = [axis for axis, index in enumerate(key) if isinstance(index, int | np.integer)]
        first, *rest = (slice(index, index + 1 or None) if axis in plain else index for axis, index in enumerate(key))
        if 0 in plain:
            sample = int(key[0]) % len(self.cache)
            rows = self.cache.rows(sample, sample + 1, [self.name])[self.name]
        else:
            rows = self.cache.load([self.name], first)[self.name]
        for axis, index in enumerate(rest, 1):
            rows = rows[(*(slice(None),) * axis, index)]
        return rows.squeeze(tuple(plain))


def dataset(cache: ShardReader) -> xarray.Dataset:
    """Return the cache as a dataset with the attributes `identity` (canonical JSON), `fingerprint` and `place`."""
    variables = {}
    for name in cache.names:
        if name not in SAMPLES_IN_COORDINATES:
            dimensions = DIMENSIONS.get(name, ("sample", "channel", "row", "column")[: cache.array(name).ndim])
            variables[name] = xarray.Variable(dimensions, indexing.LazilyIndexedArray(_LazyArray(cache, name)))
    coordinates = {name: ("sample", column) for name, column in cache.samples.items()}
    attributes = {
        "identity": canonical_json(cache.identity),
        "fingerprint": cache.fingerprint,
        "place": str(cache.storage),
    }
    return xarray.Dataset(variables, coordinates, attributes)
