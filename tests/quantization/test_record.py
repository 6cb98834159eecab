"""The quantizer record: round trip, digest, refusal of what is broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lic_dist.errors import LicError
from lic_dist.quantization.distributions import analytic_pmf
from lic_dist.quantization.rates import CdfTables, tables_from_pmf
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.trellis import ECM8, SCALAR, VVC4

Z_TABLES = CdfTables(
    cdf=np.array([[0, 10, 65530, 65536, 0], [0, 5, 400, 65000, 65536]]),
    size=np.array([4, 5]),
    offset=np.array([-1, 0]),
)


@pytest.fixture(scope="module")
def record() -> QuantizerRecord:
    return QuantizerRecord(
        name="tcq",
        trellis=ECM8,
        step=0.56,
        lmbda=0.013,
        lambda_scale=0.5,
        weights=np.array([0.5, 0.25, 3.0], np.float32),
        level_rule="nearest",
        y_tables=tables_from_pmf(analytic_pmf(0.56, ECM8)),
        z_tables=Z_TABLES,
        notes={"standard_error": [0.1, 0.2, 0.3]},
    )


def test_round_trip_through_a_file(record: QuantizerRecord, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    record.save(path)
    found = QuantizerRecord.load(path)
    assert found.digest == record.digest and len(found.digest) == 64
    assert found.notes == record.notes and found.step == record.step
    assert np.array_equal(found.weights, record.weights)
    for name in ("cdf", "size", "offset"):
        assert np.array_equal(getattr(found.y_tables, name), getattr(record.y_tables, name))
        assert np.array_equal(getattr(found.z_tables, name), getattr(record.z_tables, name))
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]


def test_notes_are_no_part_of_the_digest_and_everything_else_is(record: QuantizerRecord) -> None:
    assert replace(record, notes={}).digest == record.digest
    z_tables = replace(Z_TABLES, offset=np.array([-1, 1]))
    others = [
        replace(record, step=0.57),
        replace(record, lmbda=0.025),
        replace(record, lambda_scale=1),
        replace(record, level_rule="above"),
        replace(record, weights=record.weights * 2),
        replace(record, z_tables=z_tables),
        replace(record, trellis=VVC4),
        replace(record, trellis=replace(ECM8, name="other")),
    ]
    assert len({record.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_digest_is_golden(record: QuantizerRecord) -> None:
    small = replace(
        record,
        name="sq",
        trellis=SCALAR,
        y_tables=CdfTables(cdf=np.tile([[0, 1, 65535, 65536]], (64, 1)), size=np.full(64, 4), offset=np.full(64, -1)),
    )
    assert small.digest == "cfd12abfa9d826addf613e78562e6b274310bc1807f220f598bc7117f3af9af2"


def test_a_record_by_channel(record: QuantizerRecord) -> None:
    """Of a factorized prior: rows Q * M + channel, asymmetric, and 0 in each where k is searched."""
    skewed = CdfTables(np.tile([[0, 9, 65000, 65500, 65536]], (6, 1)), np.full(6, 5), np.tile([-1, 0], 3))
    made = replace(record, level_rule="channel", y_tables=skewed)
    assert made.by_channel and (made.levels, record.levels) == (3, 64)
    found = QuantizerRecord.from_json(made.to_json())
    assert found.digest == made.digest != record.digest and found.decoding_digest == made.decoding_digest
    with pytest.raises(ValueError, match="rows, not 8"):
        replace(made, weights=np.ones(4))
    with pytest.raises(ValueError, match="hold 0"):
        replace(made, y_tables=replace(skewed, offset=np.full(6, 1)))
    with pytest.raises(ValueError, match="rows, not 128"):
        replace(made, level_rule="nearest")


def _set(plain: dict, key: str, value: object) -> None:
    plain[key] = value


@pytest.mark.parametrize(
    "damage",
    [
        lambda plain: plain.pop("step"),
        lambda plain: _set(plain, "step", "0.56"),
        lambda plain: _set(plain, "step", -1.0),
        lambda plain: _set(plain, "step", 0.57),
        lambda plain: plain.pop("trellis"),
        lambda plain: _set(plain["trellis"], "quantizer", [0, 1]),
        lambda plain: _set(plain["trellis"], "quantizer", [0, True] * 4),
        lambda plain: _set(plain["trellis"], "next_state", [[0, 1]] * 8),
        lambda plain: _set(plain["trellis"], "next_state", [[0, 1, 2]] * 8),
        lambda plain: _set(plain["trellis"], "next_state", [[0, 100]] * 8),
        lambda plain: _set(plain["trellis"], "next_state", []),
        lambda plain: _set(plain, "rounding", 0.4),
        lambda plain: _set(plain, "shift", "0"),
        lambda plain: _set(plain, "spread", -0.1),
        lambda plain: _set(plain, "format", "something else"),
        lambda plain: _set(plain["weights"], "shape", [10**12]),
        lambda plain: _set(plain["weights"], "shape", [4]),
        lambda plain: _set(plain["weights"], "dtype", "|O"),
        lambda plain: _set(plain["weights"], "zlib", "AAAA"),
        lambda plain: _set(plain["weights"], "zlib", "\u00e9"),
        lambda plain: _set(plain, "y_tables", plain["z_tables"]),
        lambda plain: _set(plain["z_tables"], "cdf", plain["z_tables"]["size"]),
        lambda plain: _set(plain, "digest", "0" * 64),
    ],
)
def test_broken_records_end_in_one_error(record: QuantizerRecord, damage) -> None:
    plain = json.loads(record.to_json())
    damage(plain)
    with pytest.raises(LicError, match="quantizer record"):
        QuantizerRecord.from_json(json.dumps(plain))


def test_numbers_that_leave_their_type_are_refused(record: QuantizerRecord) -> None:
    for changes in ({"step": 1e-42}, {"step": 1e39}, {"weights": np.full(3, 1e38)}):
        with pytest.raises(ValueError, match="float32"):
            replace(record, **changes)
    text = record.to_json()
    for broken in (text.replace('"step": 0.56', '"step": 1' + "0" * 400), text.replace("0.1,", "NaN,")):
        with pytest.raises(LicError, match="quantizer record"):
            QuantizerRecord.from_json(broken)


def test_no_record_at_all(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", "null", "{", "[" * 200_000):
        with pytest.raises(LicError):
            QuantizerRecord.from_json(text)
    with pytest.raises(LicError, match="cannot read"):
        QuantizerRecord.load(tmp_path / "absent.json")
