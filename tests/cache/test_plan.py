"""A plan: which crops lie in which shard, and what tells two of them apart."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lic_dist.cache import plan
from lic_dist.cache.plan import Plan, differences, fingerprint
from lic_dist.errors import LicError
from tests.stores import (
    GEOMETRY,
    make_plan,
)


@given(st.integers(1, 500), st.integers(1, 80))
def test_shards_hold_every_sample_once(samples, shard):
    planned = Plan(tuple(range(samples)), GEOMETRY, shard, 1, {})
    assert [n for s in range(planned.num_shards) for n in planned.crops_of(s)] == list(range(samples))


def test_fingerprint_is_of_the_content():
    assert fingerprint({"b": 1, "a": [1.5, "x"]}) == fingerprint({"a": (1.5, "x"), "b": 1})
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(ValueError, match="not plain JSON"):
        make_plan(bad={1, 2})


def test_differences_name_each_field():
    found = {"model": {"encoder_sha256": "ab" * 32, "N": 48}, "crop": 256, "list": [1, 2]}
    expected = {"model": {"encoder_sha256": "cd" * 32, "N": 48}, "crop": 128, "list": (1, 2), "new": None}
    assert differences(found, expected) == [
        "crop: store has 256, this job has 128",
        "model.encoder_sha256: store has abababab…, this job has cdcdcdcd…",
        "new: store has nothing, this job has null",
    ]
    assert differences({"d": "a" * 63 + "b"}, {"d": "a" * 64})[0].count("a" * 63) == 2  # shown whole
    assert differences(found, found) == []


def test_no_crops_is_an_error_of_the_user():
    with pytest.raises(LicError, match="no samples"):
        Plan((), GEOMETRY, 4, 1, {})


def test_a_plan_is_plain_data():
    assert pickle.loads(pickle.dumps(make_plan())) == make_plan()
    assert dataclasses.replace(make_plan(), shard=3).num_shards == plan.num_shards(10, 3) == 4
