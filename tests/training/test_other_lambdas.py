"""Other rates of one model: quantizers calibrated for other lambdas, in the same store, retrained for and evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lic_dist import config
from lic_dist.building.build import build, requantize
from lic_dist.cache.reader import LatentCache
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.records import local_record, preferred_quantizer
from lic_dist.evaluation.results import read_points
from lic_dist.evaluation.run import evaluate
from lic_dist.models import checkpoint
from lic_dist.models.parts import encoder_digest
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.reporting.curves import read_curves
from lic_dist.training.finetune import finetune
from tests import stores
from tests.conftest import picture

BASE, LAMBDA, LOWER = "base-0.013", 0.013, 0.00325


def experiment(store: Path, **sections: object) -> config.Experiment:
    return config.Experiment.model_validate(
        {
            "model": {"checkpoint": BASE},
            "quantizer": {"name": "tcq", "lmbda": LOWER, "pilot": 8, "calibration": 4, "adapt_rounds": 1},
            "cache": {"path": str(store)},
            "engine": {"name": "local"},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a group for the base's lambda, and one for a quarter of it."""
    path = tmp_path_factory.mktemp("lambdas") / "a.zarr"
    build(stores.experiment(BASE, photos, path, quantizer=stores.FIXED))  # type: ignore[arg-type]
    requantize(experiment(path))
    return path


def test_a_group_of_another_lambda_lies_in_the_same_store(store: Path) -> None:
    cache = LatentCache.open(str(store))
    own, lower = (QuantizerRecord.from_json(cache.record_json(group)) for group in ("tcq8", f"tcq8@{LOWER}"))
    assert lower.lmbda == LOWER and own.lmbda == checkpoint.load(BASE).spec.lmbda == LAMBDA
    assert lower.step > own.step
    bits = {
        group: cache.load((f"quantized/{group}/bits",), cache.indices(False)) for group in ("tcq8", f"tcq8@{LOWER}")
    }
    rates = [float(next(iter(found.values())).astype(np.float64).sum()) for found in bits.values()]
    assert rates[1] < 0.8 * rates[0]


def test_a_decoder_is_retrained_for_the_lambda_of_its_quantizer(store: Path, tmp_path: Path) -> None:
    section = {"recipe": "decoder", "steps": 4, "batch": 4, "warmup": 1, "evaluate_every": 2, "tolerance": 1}
    job = experiment(store, finetune={**section, "out": str(tmp_path / "lower")})
    made, parent = checkpoint.load(str(finetune(job))), checkpoint.load(BASE)
    assert made.spec.lmbda == LOWER and encoder_digest(made.model) == encoder_digest(parent.model)
    assert set(made.quantizers) == {f"tcq8@{LOWER}", f"tcq8@{LOWER}-cached"}
    assert preferred_quantizer(made) == f"tcq8@{LOWER}"


def test_the_rates_of_one_model_are_one_curve(store: Path, photos: Path, tmp_path: Path) -> None:
    names = [f"{store}/quantized/tcq8", f"{store}/quantized/tcq8@{LOWER}"]
    section = {"images": str(photos / "valid"), "checkpoints": [BASE], "quantizers": names}
    results = evaluate(experiment(store, evaluate={**section, "out": str(tmp_path / "r.json")}))
    points = read_points(results)
    assert [(one.quantizer, one.lmbda) for one in points] == [("tcq8", LAMBDA), ("tcq8", LOWER)]
    (curve,) = read_curves([results])
    assert curve.name == "base tcq8" and [one.lmbda for one in curve.points] == [LOWER, LAMBDA]
    section["quantizers"] = names[:1]
    assert len(read_points(evaluate(experiment(store, evaluate={**section, "out": str(tmp_path / "r.json")})))) == 2


def test_a_file_of_another_lambda_decodes_with_its_record(store: Path) -> None:
    loaded = checkpoint.load(BASE)
    record = local_record(loaded, f"{store}/quantized/tcq8@{LOWER}")
    codec, image = ImageCodec(loaded.model, record), picture(3, 100, 90)
    encoded = codec.encode(image)
    assert np.array_equal(codec.decode(encoded.data), codec.picture(encoded))
    loaded.quantizers = {f"tcq8@{LOWER}": record.to_json()}
    assert preferred_quantizer(loaded) == "sq"


def test_sq_at_another_lambda_has_its_step_searched(store: Path) -> None:
    section = {"name": "sq", "lmbda": LOWER, "pilot": 8, "calibration": 4}
    requantize(experiment(store, quantizer=section))
    record = QuantizerRecord.from_json(LatentCache.open(str(store)).record_json(f"sq-adapted@{LOWER}"))
    assert record.step > 1 and len(record.notes["calibration"]) > 3
