"""Decoders whose pictures, coded again, give the latents that they were made of: the term by hand, and a retraining."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.building.records import analytic_record
from lic_dist.config.experiment import parse
from lic_dist.errors import UsageError
from lic_dist.evaluation.jobs import arm_of
from lic_dist.models import checkpoint
from lic_dist.models.architectures import adapt
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.idempotence import Idempotence
from tests.conftest import picture
from tests.training.test_finetune import run

CPU = torch.device("cpu")


def test_the_term_is_the_cost_of_what_the_next_generation_changes(base: Path) -> None:
    loaded = checkpoint.load(str(base))
    model = loaded.model.requires_grad_(False)
    weights = 1 + np.arange(adapt(model).channels, dtype=np.float32)
    record = analytic_record(loaded, "sq", 1, 1.0, 0.0, weights)
    x = torch.from_numpy(np.stack([picture(seed, 64, 64) for seed in (1, 2)]).transpose(0, 3, 1, 2) / 255).float()
    y = adapt(model).analyse(x)
    term = Idempotence(3.0, model, record, CPU)
    assert float(term(x, y)) == 0
    assert float(term(torch.where(x == 1, 1.5, x), y)) == 0  # as it is shown

    y_hat = y + 0.25 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    x_hat = (0.9 * x + 0.05).requires_grad_()
    found = term(x_hat, y_hat)
    error = (adapt(model).analyse(x_hat) - y_hat).square().double().detach().numpy()
    expected = sum(float(weight) * error[:, channel].sum() for channel, weight in enumerate(record.weights))
    assert float(found.detach()) == pytest.approx(3 * 255**2 * expected / (3 * 2 * 64 * 64), rel=1e-4)
    found.backward()
    assert x_hat.grad is not None and float(x_hat.grad.norm()) > 0
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.slow
def test_a_retrained_decoder_is_nearer_to_idempotence(base: Path, photos: Path, store: Path, tmp_path: Path) -> None:
    def changes(weight: float) -> float:
        """The term of the cache's held-out photo by the retrained decoder, at a weight of 1."""
        out = run(
            base,
            photos,
            store,
            tmp_path / str(weight),
            distortion={"mse": 1, "idempotence": weight},
            tolerance=1.0,
            steps=12,
            evaluate_every=12,
            lr=1e-3,
        )
        assert arm_of(out) == ("decoder idempotence 30" if weight else "decoder control")
        model, record = out.model, QuantizerRecord.from_json(out.quantizers["tcq8"])
        x = torch.from_numpy(picture(40, 128, 128).transpose(2, 0, 1)[None] / 255).float()
        with torch.no_grad():
            y = adapt(model).analyse(x)
            return float(Idempotence(1.0, model, record, CPU)(adapt(model).synthesise(y), y))

    assert changes(30) < 0.9 * changes(0)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"distortion": {"idempotence": 3}}, "holds no content"),
        ({"distortion": {"mse": 1, "idempotence": 1}, "schedule": "plateau"}, "L does not tell progress"),
        ({"distortion": {"mse": 1, "idempotence": -1}}, "numbers of at least 0"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(section: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse({"finetune": section}, "a.yaml")


def test_its_tolerance_and_rounds() -> None:
    given = {"distortion": {"mse": 1, "idempotence": 1}}
    assert config.Finetune(**given).tolerance == 0.02 and config.Finetune(**given, rounds=2).rounds == 2
    both = {"distortion": {"mse": 1, "idempotence": 1, "adversarial": 8}}
    assert config.Finetune(**both).tolerance == 0.25
