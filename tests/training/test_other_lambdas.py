"""Other rates of one model: quantizers calibrated for other lambdas, in the same store, retrained for and evaluated."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.building.build import build, requantize
from lic_dist.cache.mixture import Mixture
from lic_dist.cache.reader import LatentCache
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.records import local_record, preferred_quantizer
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.results import read_points
from lic_dist.evaluation.run import evaluate
from lic_dist.models import checkpoint
from lic_dist.models.parts import encoder_digest, model_digest
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.reporting.curves import read_curves
from lic_dist.training.distributed import Ranks
from lic_dist.training.finetune import finetune
from lic_dist.training.samples import training_data, turn
from tests import stores
from tests.conftest import dying_at, picture

pytestmark = pytest.mark.slow
BASE, LAMBDA, LOWER = "base-0.013", 0.013, 0.00325
SETTINGS = {"pilot": 8, "calibration": 4, "adapt_rounds": 1, "lambda_scale": 0.2, "shift": 0.1}  # the step is searched


def experiment(store: Path, **sections: object) -> config.Experiment:
    return config.Experiment.model_validate(
        {
            "model": {"checkpoint": BASE},
            "quantizer": {"name": "tcq", "lmbda": LOWER, **SETTINGS},
            "cache": {"path": str(store)},
            "engine": {"name": "local"},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a group for the base's lambda, and one for a quarter of it."""
    path = tmp_path_factory.mktemp("lambdas") / "a.zarr"
    build(stores.experiment(BASE, photos, path, quantizer=SETTINGS))
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


def rates(store: Path, out: Path, **finetune: object) -> config.Experiment:
    """A job over both lambdas."""
    document = experiment(store).model_dump(mode="json", exclude_none=True)
    document["quantizer"] = {"name": "tcq", **SETTINGS, "group": "tcq8"}
    section = {
        "groups": ["tcq8", f"tcq8@{LOWER}"],
        "steps": 6,
        "batch": 4,
        "warmup": 1,
        "evaluate_every": 3,
        **finetune,
    }
    return config.Experiment.model_validate({**document, "finetune": {"lr": 1e-4, "out": str(out), **section}})


def test_a_batch_has_the_indices_of_the_group_whose_turn_it_is(store: Path) -> None:
    cache = LatentCache.open(str(store))
    names = ("tcq8", f"tcq8@{LOWER}")
    groups = {name: Quantizer(QuantizerRecord.from_json(cache.record_json(name))) for name in names}
    section = rates(store, store).finetune
    assert section is not None
    ranks, turns = Ranks(0, 1, torch.device("cpu")), [turn(section.seed, step, 2) for step in range(6)]
    assert set(turns) == {0, 1}
    for streams in ("auto", 1):
        training = training_data(Mixture([cache]), groups, True, section.model_copy(update={"streams": streams}))
        for first in (0, 3):
            with closing(training.batches(first, ranks)) as batches:
                for step, batch in zip(range(first, 6), batches, strict=False):
                    group, order = names[turns[step]], np.argsort(batch.sample.numpy())
                    stored = cache.load((f"quantized/{group}/k",), batch.sample.numpy()[order])
                    assert np.array_equal(batch.k.numpy()[order], stored[f"quantized/{group}/k"])


def test_one_decoder_is_retrained_on_several_rates_and_goes_on_where_it_was_killed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = checkpoint.load(str(finetune(rates(store, tmp_path / "whole", tolerance=1))))
    groups = {"tcq8", f"tcq8@{LOWER}"}
    assert whole.spec.lmbda == LAMBDA and set(whole.quantizers) == groups | {f"{one}-cached" for one in groups}
    assert QuantizerRecord.from_json(whole.quantizers[f"tcq8@{LOWER}"]).lmbda == LOWER
    entry = whole.history[-1]
    assert set(entry["groups"]) == set(entry["by_group"]) == groups and "record" not in entry
    assert [one["source"] for one in entry["sources"]] == ["tcq8 all", f"tcq8@{LOWER} all"]
    for one in groups:
        assert entry["held_out_before"]["by_source"][one] > 0
    with monkeypatch.context() as patched:
        patched.setattr("lic_dist.training.loop.take_step", dying_at(4))
        with pytest.raises(KeyboardInterrupt):
            finetune(rates(store, tmp_path / "cut", tolerance=1))
    again = checkpoint.load(str(finetune(rates(store, tmp_path / "cut", tolerance=1))))
    assert model_digest(again.model) == model_digest(whole.model) != model_digest(checkpoint.load(BASE).model)
    assert again.quantizers == whole.quantizers


def test_groups_that_are_named_twice_or_not_there_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names one twice: tcq8, tcq8"):
        finetune(rates(store, tmp_path, groups=["tcq8", "tcq8"]))
    with pytest.raises(LicError, match="tcq9"):
        finetune(rates(store, tmp_path, groups=["tcq8", "tcq9"]))
