"""The quantizer record: all data of a quantizer, stored and hashed, never recomputed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lic_dist.errors import LicError
from lic_dist.quantization.kinds import KINDS, Kind
from lic_dist.quantization.rates import LEVEL_RULES, LEVELS, SCALES, CdfTables
from lic_dist.quantization.trellis import SCALAR, Trellis

FORMAT = "lic_dist quantizer record 2"
POINT_PLANES, POINT_MAGNITUDES = 3, 3  # of points: planes from 0 on, m from 1 on; the last stand for all beyond
POINTS = LEVELS, POINT_PLANES, POINT_MAGNITUDES
MSE = {"mse": 1.0}
MEASURES = ("mse", "ms-ssim")  # that refinement may weigh
_MOST_BYTES = 1 << 25  # limits what a broken record may claim
_DTYPES = ("<i4", "<f4")
NO_Z = CdfTables(np.array([[0, 1 << 15, 1 << 16]]), np.array([3]), np.array([0]))


@dataclass(frozen=True, eq=False)
class QuantizerRecord:
    """A quantizer and its rate tables. Two records with the same digest write the same bits.

        name          of its kind: one of KINDS
        step          Delta of the scalar quantizers, D of TCQ's union lattice, in units of the latent
        lmbda         lambda of the loss lmbda 255^2 MSE + bpp
        lambda_scale  g in the price of a bit, lambda_q = g 3 / (lmbda 255^2); only searches use it
        weights       float32 [M]: S_c, squared change of the picture for a unit change of a latent of channel c
        level_rule    "nearest" or "above": how a scale becomes a level; "channel": y has a factorized prior, and a
                      level is a channel
        y_tables      rows Q * levels + level, 64 levels or M; for a search symmetric, or by channel with 0 in each row
        trellis       TCQ's state machine; SCALAR for the others
        rounding      xi of the dead zone, up to 1/2
        shift         delta of the reconstruction: levels lie so many steps further from zero than in the search
        spread        and min(1, spread step / sigma) steps further yet, sigma the scale of the level
        level_shifts  and so many steps more at each scale level: float32 [levels] or None, where y has scales
        points        of bit planes: by which share the values of nodes lie further out, or None; float32
                      [levels, POINT_PLANES, POINT_MAGNITUDES], by plane and m (quantization/embedded.py)
        refine        gradient steps of y before the search (models/refine.py)
        refine_distortion  what these weigh: mse, ms-ssim or both, each with its weight
        refine_z      whether they move z too
        scale_offsets whether a picture's file may hold offsets for the levels of its channels (codec/offsets.py)
        z_tables      rows are channels of z; a quantizer that codes no z may leave them out
        notes         provenance, plain JSON: standard errors, calibration curve; not part of the digest

    Raises ValueError for an invalid field.
    """

    name: str
    step: float
    lmbda: float
    lambda_scale: float
    weights: NDArray[Any]
    level_rule: str
    y_tables: CdfTables
    trellis: Trellis = SCALAR
    rounding: float = 0.5
    shift: float = 0.0
    spread: float = 0.0
    level_shifts: NDArray[Any] | None = None
    points: NDArray[Any] | None = None
    refine: int = 0
    refine_distortion: Mapping[str, float] = field(default_factory=lambda: dict(MSE))
    refine_z: bool = False
    scale_offsets: bool = False
    z_tables: CdfTables = NO_Z
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise ValueError(f"no quantizer {self.name!r}: there are {', '.join(KINDS)}")
        if self.kind.trellis != (self.trellis.quantizers == 2):
            raise ValueError(f"{self.name} does not go with the trellis {self.trellis.name}")
        for name in ("step", "lmbda", "lambda_scale"):
            value = float(getattr(self, name))
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name} is a positive number, not {value}")
            object.__setattr__(self, name, value)
        for name in ("rounding", "shift", "spread"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not (0 <= self.rounding <= 0.5 and -0.5 < self.shift < 0.5):
            raise ValueError(f"a record has 0 <= rounding <= 1/2, |shift| < 1/2: not {self.rounding}, {self.shift}")
        if not 0 <= self.spread < 1 or (self.spread and self.by_channel):
            raise ValueError(f"a record has 0 <= spread < 1, and 0 without scales: not {self.spread}")
        if self.level_shifts is not None:
            level_shifts = np.array(self.level_shifts, np.float32)
            if self.by_channel or level_shifts.shape != (LEVELS,) or not (np.abs(level_shifts) < 1).all():
                raise ValueError(f"level_shifts are {LEVELS} numbers below 1 step, and None without scales")
            level_shifts.setflags(write=False)
            object.__setattr__(self, "level_shifts", level_shifts)
        if self.points is not None:
            points = np.array(self.points, np.float32)
            if not self.kind.embedded or points.shape != POINTS or not (np.abs(points) < 1).all():
                raise ValueError(f"points are numbers below 1 of shape {POINTS}, and None but for bit planes")
            points.setflags(write=False)
            object.__setattr__(self, "points", points)
        if self.refine < 0:
            raise ValueError(f"refine is a number of steps, not {self.refine}")
        weights_of = {str(name): float(weight) for name, weight in self.refine_distortion.items()}
        if not weights_of or not all(name in MEASURES and 0 < one < np.inf for name, one in weights_of.items()):
            raise ValueError(f"refine_distortion has positive weights of {', '.join(MEASURES)}, not {weights_of}")
        object.__setattr__(self, "refine_distortion", weights_of)
        if self.scale_offsets and self.by_channel:
            raise ValueError("scale_offsets are for tables by scale, these are by channel")
        if self.kind.strength != "rounding" and self.rounding != 0.5:
            raise ValueError(f"rounding is the dead zone's, not {self.name}'s")
        if self.kind.embedded and (self.by_channel or self.refine or (self.step, self.shift, self.spread) != (1, 0, 0)):
            raise ValueError("an embedded record has step 1, no shift, spread or refinement, and levels of scales")
        weights = np.array(self.weights, np.float32)
        if weights.ndim != 1 or not len(weights) or not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError("weights are one finite number >= 0 a channel")
        weights.setflags(write=False)
        object.__setattr__(self, "weights", weights)
        with np.errstate(over="ignore", divide="ignore"):
            steps = np.array([self.step, 1 / np.float32(self.step)], np.float32)
            finite = np.isfinite(steps).all() and steps.all() and np.isfinite(self.channel_weights).all()
        if not finite:
            raise ValueError(f"a step of {self.step} with these weights and lambda leaves float32")
        if self.level_rule not in LEVEL_RULES:
            raise ValueError(f"no level rule {self.level_rule!r}: there are {', '.join(LEVEL_RULES)}")
        if self.y_tables.rows != self.levels * self.trellis.quantizers:
            raise ValueError(f"y_tables have {self.y_tables.rows} rows, not {self.levels * self.trellis.quantizers}")
        if self.kind.searched and not (self.y_tables.holds_zero if self.by_channel else self.y_tables.symmetric):
            raise ValueError(f"{self.name} needs y_tables that {'hold 0' if self.by_channel else 'are symmetric'}")

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def strength(self) -> float:
        """The kind's strength (g or xi): what calibration moves; 1 where the kind has none."""
        return float(getattr(self, self.kind.strength)) if self.kind.strength else 1.0

    @property
    def by_channel(self) -> bool:
        """Whether levels are channels: y has a factorized prior."""
        return self.level_rule == "channel"

    @property
    def follows_scales(self) -> bool:
        """Whether levels of reconstruction depend on sigma."""
        return self.spread > 0 or self.level_shifts is not None or self.kind.embedded

    @property
    def is_unit_sq(self) -> bool:
        """Whether it rounds to integers about the means, the cells of CompressAI's likelihood."""
        return (self.name, self.step, self.shift, self.follows_scales) == ("sq", 1, 0, False)

    @property
    def levels(self) -> int:
        """How many levels each quantizer's tables have."""
        return len(self.weights) if self.by_channel else LEVELS

    @property
    def states(self) -> int:
        """How many states the trellis has: 1 for the scalar quantizers."""
        return self.trellis.states

    @property
    def lambda_q(self) -> float:
        """The price of a bit, as a squared error summed over the pixels and colours: g 3 / (lmbda 255^2)."""
        return self.lambda_scale * 3.0 / (self.lmbda * 255.0**2)

    @cached_property
    def channel_weights(self) -> NDArray[Any]:
        """The cost in 1/256 bit of a squared error of one step, 256 S_c D^2 / lambda_q: float32 [M]."""
        weights: NDArray[Any] = (256.0 * self.weights.astype(np.float64) * self.step**2 / self.lambda_q).astype(
            np.float32
        )
        return weights

    @cached_property
    def shifts(self) -> NDArray[Any]:
        """How many steps further from zero the levels of each scale lie than in the search, float32 [levels]."""
        shifts = np.full(self.levels, self.shift)
        if self.spread:
            shifts += np.minimum(self.spread * self.step / SCALES.astype(np.float64), 1.0)
        if self.level_shifts is not None:
            shifts += self.level_shifts
        return shifts.astype(np.float32)

    def lane_weights(self, images: int) -> NDArray[Any]:
        """Return the `channel_weights` of the lanes of whole images: float32 [images * M]."""
        return np.tile(self.channel_weights, images)

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON of everything but the notes; arrays enter by the sha256 of their bytes."""
        return hashlib.sha256(_canonical(self._plain(_array_digest)).encode()).hexdigest()

    @cached_property
    def decoding_digest(self) -> str:
        """Digest of what a decoder reads, equal for quantizers that differ only in their search."""
        plain = self._plain(_array_digest)
        read = {key: plain[key] for key in ("format", "trellis", "step", "level_rule", "shift", "y_tables", "z_tables")}
        read |= {key: plain[key] for key in ("spread", "level_shifts", "points") if key in plain}
        return hashlib.sha256(_canonical(read).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the record as JSON; arrays as zlib and base64 with dtype and shape."""
        return json.dumps({**self._plain(_pack), "digest": self.digest, "notes": self.notes}, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> QuantizerRecord:
        """Return the record of `to_json`; LicError for another text, or one whose digest is not the one it states."""
        try:
            plain = json.loads(text, parse_constant=_refuse_constant)
            if not isinstance(plain, dict) or plain.get("format") != FORMAT:
                raise ValueError(f"it does not state the format {FORMAT!r}")
            record = QuantizerRecord(
                name=_typed(plain, "name", str),
                step=_typed(plain, "step", float),
                lmbda=_typed(plain, "lmbda", float),
                lambda_scale=_typed(plain, "lambda_scale", float),
                weights=_unpack(_typed(plain, "weights", dict)),
                level_rule=_typed(plain, "level_rule", str),
                y_tables=_unpack_tables(_typed(plain, "y_tables", dict)),
                trellis=_unpack_trellis(_typed(plain, "trellis", dict)),
                rounding=_typed(plain, "rounding", float),
                shift=_typed(plain, "shift", float),
                spread=_typed({"spread": 0.0, **plain}, "spread", float),
                level_shifts=_unpack(_typed(plain, "level_shifts", dict)) if "level_shifts" in plain else None,
                points=_unpack(_typed(plain, "points", dict)) if "points" in plain else None,
                refine=_typed({"refine": 0, **plain}, "refine", int),
                refine_distortion=_weights(_typed({"refine_distortion": MSE, **plain}, "refine_distortion", dict)),
                refine_z=_typed({"refine_z": False, **plain}, "refine_z", bool),
                scale_offsets=_typed({"scale_offsets": False, **plain}, "scale_offsets", bool),
                z_tables=_unpack_tables(_typed(plain, "z_tables", dict)),
                notes=_typed(plain, "notes", dict),
            )
            stated = _typed(plain, "digest", str)
        except (ValueError, OverflowError, RecursionError, zlib.error) as error:
            raise LicError(f"not a quantizer record: {error}", hint="write it again with `cache adapt`") from error
        if stated != record.digest:
            raise LicError(
                f"an altered quantizer record: states digest {stated[:12]}, has {record.digest[:12]}",
                hint="write it again with `cache adapt`",
            )
        return record

    def save(self, path: str | Path) -> None:
        """Write the record to a file, atomically: a reader sees the old file or the whole new one."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(self.to_json() + "\n", encoding="utf-8")
        os.replace(partial, path)

    @staticmethod
    def load(path: str | Path) -> QuantizerRecord:
        """Read the record of `save`; LicError where there is none or it is broken."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LicError(f"cannot read the quantizer record {path}: {error}") from error
        return QuantizerRecord.from_json(text)

    def _plain(self, array: Any) -> dict[str, Any]:
        """Return every field but the notes as plain JSON, arrays converted by `array`."""

        def tables(value: CdfTables) -> dict[str, Any]:
            return {"cdf": array(value.cdf), "size": array(value.size), "offset": array(value.offset)}

        return {
            "format": FORMAT,
            "name": self.name,
            "trellis": {
                "name": self.trellis.name,
                "quantizer": list(self.trellis.quantizer),
                "next_state": [list(pair) for pair in self.trellis.next_state],
            },
            "step": self.step,
            "lmbda": self.lmbda,
            "lambda_scale": self.lambda_scale,
            "weights": array(self.weights),
            "level_rule": self.level_rule,
            "rounding": self.rounding,
            "shift": self.shift,
            "y_tables": tables(self.y_tables),
            "z_tables": tables(self.z_tables),
            # what older records do not have is left out where it says nothing, so that they keep their digests
            **({"spread": self.spread} if self.spread else {}),
            **({"level_shifts": array(self.level_shifts)} if self.level_shifts is not None else {}),
            **({"points": array(self.points)} if self.points is not None else {}),
            **({"refine": self.refine} if self.refine else {}),
            **({"refine_distortion": dict(self.refine_distortion)} if self.refine_distortion != MSE else {}),
            **({"refine_z": True} if self.refine_z else {}),
            **({"scale_offsets": True} if self.scale_offsets else {}),
        }


def _canonical(plain: Mapping[str, Any]) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _little_endian(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def _array_digest(array: NDArray[Any]) -> dict[str, Any]:
    raw = _little_endian(array)
    return {
        "dtype": raw.dtype.str,
        "shape": list(raw.shape),
        "sha256": hashlib.sha256(raw.tobytes()).hexdigest(),
    }


def _pack(array: NDArray[Any]) -> dict[str, Any]:
    raw = _little_endian(array)
    data = base64.b64encode(zlib.compress(raw.tobytes(), 9)).decode("ascii")
    return {"dtype": raw.dtype.str, "shape": list(raw.shape), "zlib": data}


def _unpack(plain: dict[str, Any]) -> NDArray[Any]:
    """Return the array of `_pack`; ValueError or zlib.error where it is none. Inflates no more than its shape needs."""
    name, shape = _typed(plain, "dtype", str), _typed(plain, "shape", list)
    if name not in _DTYPES or not all(type(side) is int and 0 <= side <= _MOST_BYTES for side in shape):
        raise ValueError(f"no array of a record has dtype {name} and shape {shape}")
    dtype = np.dtype(name)
    length = dtype.itemsize
    for side in shape:
        length *= side
    if length > _MOST_BYTES:
        raise ValueError(f"an array of {length} bytes is no part of a record")
    packed = base64.b64decode(_typed(plain, "zlib", str), validate=True)
    raw = zlib.decompressobj().decompress(packed, length + 1)
    if len(raw) != length:
        raise ValueError(f"an array holds other than the {length} bytes of its shape")
    return np.frombuffer(raw, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _unpack_tables(plain: dict[str, Any]) -> CdfTables:
    return CdfTables(**{name: _unpack(_typed(plain, name, dict)) for name in ("cdf", "size", "offset")})


def _weights(plain: dict[str, Any]) -> dict[str, float]:
    return {name: _typed(plain, name, float) for name in plain}


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _unpack_trellis(plain: dict[str, Any]) -> Trellis:
    pairs = _typed(plain, "next_state", list)
    quantizer = _typed(plain, "quantizer", list)
    flat = [one for pair in pairs if isinstance(pair, list) and len(pair) == 2 for one in pair]
    if len(flat) != 2 * len(pairs) or not pairs or {type(one) for one in [*flat, *quantizer]} != {int}:
        raise ValueError("a trellis is a quantizer (0 or 1) and a pair of next states for each state")
    return Trellis(_typed(plain, "name", str), tuple(quantizer), tuple((even, odd) for even, odd in pairs))


def _typed(plain: dict[str, Any], key: str, kind: type) -> Any:
    """Return the entry `key` if it is of this kind (an integer serves as a float); ValueError otherwise."""
    value = plain.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{key} is {'missing' if key not in plain else 'of the wrong kind'}")
    return value
