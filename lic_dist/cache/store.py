"""Writing a store: create it, add groups, write one shard, list what is still to do.

    create -> (create_group) -> write_shard for every shard that `pending` lists -> LatentCache

A store and a group are born whole: they are made beside their place and renamed into it, so that
`zarr.json` is never half there and the first of two planners wins. After that only whole shards are
written, each by one owner.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from lic_dist.cache import layout, markers
from lic_dist.cache.layout import ArraySpec, Header
from lic_dist.cache.plan import Plan, differences, fingerprint
from lic_dist.errors import LicError
from lic_dist.images import FAULTS, Crop

GROUP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def create(path: Path | str, plan: Plan, store_y: bool = True, provenance: Mapping[str, Any] | None = None) -> None:
    """Make the store of a plan, all arrays empty but `samples/*`; does nothing where it is there already.

    `provenance` (versions, host, argv ...) is kept as it is and never compared.

    Raises:
        LicError: something else lies at `path`, or a store of another identity or plan; each differing
        field is named.
    """
    path = Path(path)
    if not path.exists():
        temporary = _beside(path)
        try:
            _fill(temporary, plan, store_y, dict(provenance or {}))
            _publish(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    header = layout.read_header(path)
    _require_same(f"{path} holds another cache", header.identity, plan.identity)
    found = {name: value for name, value in asdict(header).items() if name not in ("fingerprint", "provenance")}
    _require_same(f"{path} follows another plan", found, _planned(plan, store_y))


def create_group(
    path: Path | str,
    name: str,
    record_json: str,
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Add the group `quantized/<name>` with its quantizer record; does nothing where it is there already.

    `identity` names what its numbers depend on beyond the store's own identity (the record's digest, the
    sha256 of the entropy-side tensors). The record's text is written beside the arrays as `record.json`.

    Raises:
        LicError: a bad name, or a group of another identity under this name; each differing field is named.
    """
    path = Path(path)
    header = layout.read_header(path)
    if not GROUP_NAME.fullmatch(name):
        raise LicError(f"'{name}' cannot name a group", hint="letters, digits, and . _ - after the first")
    whole = {"group": name, "cache": header.fingerprint, **identity}
    target = path / "quantized" / name
    if not target.exists():
        temporary = _beside(path)
        try:
            attributes = {
                "identity": whole,
                "fingerprint": fingerprint(whole),
                "provenance": dict(provenance or {}),
            }
            made = temporary / "quantized" / name
            zarr.create_group(str(made), attributes=attributes)
            for spec in layout.group_arrays(name, header.geometry):
                layout.create_array(temporary, spec, header.num_shards, header.shard)
            markers.write_atomically(made / "record.json", record_json.encode())
            _publish(made, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _require_same(f"group '{name}' of {path} is another one", _group_attributes(path, name)["identity"], whole)


def write_shard(
    path: Path | str,
    plan: Plan,
    shard: int,
    arrays: Mapping[str, NDArray[Any]],
    seconds: float | Mapping[str, float] = 0.0,
) -> None:
    """Write one whole shard and then its marker: the base arrays, the arrays of groups, or both at once.

    `arrays` maps names as in layout.py ("pixels", "latents/y", "latents/z", "samples/status";
    "quantized/<group>/k", "bits", "distortion") to arrays of the shard's samples, without padding and of
    the exact type. The arrays of the base, and of each group, come all or none. Samples whose status is not
    0 are written as zeros.

    Raises:
        ValueError: an array that is missing, unknown, not finite, or of another shape or type.
        LicError: not the plan's store, or a group's shard whose base shard is not written.
    """
    path = Path(path)
    header = layout.read_header(path)
    _require_same(f"{path} holds another cache", header.identity, plan.identity)
    base = layout.base_arrays(header.geometry, header.store_y)
    grouped = {name.split("/")[1] for name in arrays if name.startswith("quantized/") and name.count("/") == 2}
    groups = {name: layout.group_arrays(name, header.geometry) for name in sorted(grouped)}
    with_base = any(spec.name in arrays for spec in base)
    expected = [*(base if with_base else ()), *(spec for specs in groups.values() for spec in specs)]
    _check_arrays(arrays, expected, header.count(shard))

    if with_base:
        status = arrays["samples/status"]
        rows = sample_rows(plan.crops_of(shard), header.source_bytes)
        specs = [*layout.sample_arrays(header.source_bytes), *base]
        _write(path, header, shard, specs, {**rows, **arrays}, status, header.fingerprint, seconds)
    elif not markers.is_done(path, header.fingerprint, shard):
        raise LicError(f"shard {shard} of {path} holds no latents yet", hint="`lic-dist cache build` first")
    else:
        status = _read_status(path, header, shard)
    for name, group_specs in groups.items():
        group_fingerprint = _group_attributes(path, name)["fingerprint"]
        _write(path, header, shard, group_specs, arrays, status, group_fingerprint, seconds)


def pending(path: Path | str, plan: Plan, group: str | None = None) -> list[int]:
    """The shards to do: the plan minus those whose marker parses and whose objects have its sizes.

    Raises:
        LicError: no store, or no such group.
    """
    path = Path(path)
    key = plan.fingerprint if group is None else _group_attributes(path, group)["fingerprint"]
    return [shard for shard in range(plan.num_shards) if not markers.is_done(path, key, shard)]


def forget(path: Path | str, shard: int, group: str | None = None) -> None:
    """Remove a shard's marker, so that the next job writes it again (what `verify` found damaged, say)."""
    path = Path(path)
    header = layout.read_header(path)
    key = header.fingerprint if group is None else _group_attributes(path, group)["fingerprint"]
    markers.remove_marker(path, key, shard)


def sample_rows(crops: Sequence[Crop], source_bytes: int) -> dict[str, NDArray[Any]]:
    """The rows of `samples/*` that the plan knows, one a crop."""

    def text(values: list[str], width: int) -> NDArray[np.uint8]:
        encoded = np.array([value.encode() for value in values], dtype=f"S{width}")
        return encoded.view(np.uint8).reshape(len(values), width)

    return {
        "samples/source": text([crop.source for crop in crops], source_bytes),
        "samples/digest": text([crop.digest for crop in crops], layout.DIGEST_BYTES),
        "samples/crop_y": np.array([crop.crop_y for crop in crops], np.int32),
        "samples/crop_x": np.array([crop.crop_x for crop in crops], np.int32),
        "samples/flip": np.array([crop.flip for crop in crops], np.bool_),
        "samples/held_out": np.array([crop.held_out for crop in crops], np.bool_),
    }


def _fill(temporary: Path, plan: Plan, store_y: bool, provenance: dict[str, Any]) -> None:
    attributes = {"format": layout.FORMAT, **_planned(plan, store_y), "provenance": provenance}
    zarr.create_group(str(temporary), attributes={**attributes, "fingerprint": plan.fingerprint})
    for name in ("latents", "quantized", "samples"):
        zarr.create_group(str(temporary / name))
    for spec in layout.base_arrays(plan.geometry, store_y):
        names = {"names": FAULTS, "unwritten": layout.UNWRITTEN} if spec.name == "samples/status" else {}
        layout.create_array(temporary, spec, plan.num_shards, plan.shard, names)
    rows = sample_rows(plan.crops, plan.source_bytes)
    for spec in layout.sample_arrays(plan.source_bytes):
        layout.create_array(temporary, spec, plan.num_shards, plan.shard)
        padded = _padded(rows[spec.name], spec, plan.num_shards * plan.shard)
        layout.open_array(temporary, spec.name, "r+")[:] = padded


def _planned(plan: Plan, store_y: bool) -> dict[str, Any]:
    return {
        "num_samples": plan.num_samples,
        "shard": plan.shard,
        "batch": plan.batch,
        "geometry": asdict(plan.geometry),
        "store_y": store_y,
        "source_bytes": plan.source_bytes,
        "identity": plan.identity,
    }


def _require_same(refusal: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if lines := differences(found, expected):
        raise LicError(f"{refusal}: {'; '.join(lines)}", hint="give this one another path or name, or remove it")


def _group_attributes(path: Path, name: str) -> dict[str, Any]:
    attributes = layout.read_attributes(path / "quantized" / name)
    if attributes is None or "fingerprint" not in attributes:
        known = ", ".join(layout.group_names(path)) or "none"
        raise LicError(f"no group '{name}' in {path}", hint=f"it has: {known}")
    return attributes


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def _publish(made: Path, target: Path) -> None:
    """Rename a folder into place; where another process was first, its folder stands."""
    try:
        made.rename(target)
    except OSError:
        if not target.exists():
            raise


def _check_arrays(arrays: Mapping[str, NDArray[Any]], expected: Sequence[ArraySpec], count: int) -> None:
    names = {spec.name for spec in expected}
    if not expected or names != arrays.keys():
        missing, unknown = sorted(names - arrays.keys()), sorted(arrays.keys() - names)
        raise ValueError(f"a shard is written whole: missing {missing}, unknown {unknown}")
    for spec in expected:
        array = arrays[spec.name]
        if array.shape != (count, *spec.shape) or array.dtype != np.dtype(spec.dtype):
            wanted = f"{spec.dtype} {(count, *spec.shape)}"
            raise ValueError(f"{spec.name}: {array.dtype} {array.shape}, should be {wanted}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{spec.name}: values that are not finite")


def _write(
    path: Path,
    header: Header,
    shard: int,
    specs: Sequence[ArraySpec],
    arrays: Mapping[str, NDArray[Any]],
    status: NDArray[np.uint8],
    key: str,
    seconds: float | Mapping[str, float],
) -> None:
    faulty = status != 0
    with markers.owner(path, key, shard):
        markers.remove_marker(path, key, shard)
        objects: dict[str, dict[str, Any]] = {}
        for spec in specs:
            values = arrays[spec.name]
            if faulty.any() and not spec.name.startswith("samples/"):
                values = values.copy()
                values[faulty] = 0
            file = layout.object_path(path, spec, shard)
            file.unlink(missing_ok=True)  # Zarr must not read, nor merge with, what an interrupted writer left
            target = layout.open_array(path, spec.name, "r+")
            target[shard * header.shard : (shard + 1) * header.shard] = _padded(values, spec, header.shard)
            objects[file.relative_to(path).as_posix()] = markers.hash_object(file)
        marker = markers.Marker(
            key,
            shard,
            len(status),
            int(faulty.sum()),
            objects,
            _total(specs, arrays, "bits", ~faulty),
            _total(specs, arrays, "distortion", ~faulty),
            dict(seconds) if isinstance(seconds, Mapping) else float(seconds),
        )
        markers.write_marker(path, marker)


def _total(
    specs: Sequence[ArraySpec], arrays: Mapping[str, NDArray[Any]], what: str, good: NDArray[np.bool_]
) -> float | None:
    for spec in specs:
        if spec.name.endswith(f"/{what}"):
            return float(arrays[spec.name][good].astype(np.float64).sum())
    return None


def _padded(values: NDArray[Any], spec: ArraySpec, length: int) -> NDArray[Any]:
    if len(values) == length:
        return values
    padded = np.full((length, *spec.shape), spec.fill_value, spec.dtype)
    padded[: len(values)] = values
    return padded


def _read_status(path: Path, header: Header, shard: int) -> NDArray[np.uint8]:
    first = shard * header.shard
    rows = layout.open_array(path, "samples/status")[first : first + header.count(shard)]
    return np.asarray(rows)
