from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist.codec.records import fits, preferred_quantizer, record_by_id
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import ARCHITECTURES, ModelSpec, adapt, build, family
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import (
    RECIPES,
    decoder_digest,
    encoder_digest,
    entropy_digest,
    freeze_all_but,
    trainable,
)
from lic_dist.models.protocol import Stage
from lic_dist.models.stages import analyse, dequantize_z
from lic_dist.quantization.record import QuantizerRecord
from tests.conftest import HYPERPRIORS


def fresh(architecture: str = "mbt2018-mean") -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(build(architecture, 8, 12).eval(), ModelSpec(architecture, 8, 12, 0.013))


@pytest.mark.parametrize("architecture", HYPERPRIORS)
def test_save_and_load_give_the_same_tensors_and_contents(architecture: str, tmp_path: Path) -> None:
    made = fresh(architecture)
    made.quantizers["x"] = "{}"
    made.history.append({"what": "test"})
    checkpoint.save(made, tmp_path / "c.pth.tar")
    loaded = checkpoint.load(str(tmp_path / "c.pth.tar"))
    assert loaded.spec == made.spec and loaded.quantizers == {"x": "{}"} and loaded.history == [{"what": "test"}]
    assert checkpoint.digest(loaded.model.state_dict()) == checkpoint.digest(made.model.state_dict())


def test_tables_of_equal_scales_are_made_once_and_shared_by_no_models() -> None:
    one, other, wider = (fresh().model.gaussian_conditional for _ in range(3))
    names = ("_quantized_cdf", "_offset", "_cdf_length")
    scales = [0.2, 1.0, 30.0]
    for layer, table in ((one, scales), (wider, [0.2, 1.0, 31.0]), (other, scales)):
        layer.update_scale_table(table, force=True)
    for name in names:
        getattr(one, name).zero_()
    other.update()
    found = [getattr(other, name).clone() for name in names]
    update = type(other).update
    getattr(update, "__wrapped__", update)(other)  # as CompressAI has it
    assert all(torch.equal(table, getattr(other, name)) for table, name in zip(found, names, strict=True))
    assert int(wider._cdf_length[-1]) > int(other._cdf_length[-1]) > 100


def test_float16_halves_the_file_and_loads_to_float32(tmp_path: Path) -> None:
    made = fresh()
    checkpoint.save(made, tmp_path / "half.pth.tar", torch.float16)
    loaded = checkpoint.load(str(tmp_path / "half.pth.tar"))
    weight = loaded.model.g_s[0].weight
    assert weight.dtype == torch.float32 and torch.equal(weight, made.model.g_s[0].weight.half().float())
    for name, buffer in made.model.named_buffers():
        if not name.startswith("entropy_bottleneck._"):  # the tables follow from the rounded parameters
            assert torch.equal(dict(loaded.model.named_buffers())[name], buffer), name


@pytest.mark.parametrize("name", sorted(checkpoint.zoo()))
def test_the_zoo_is_small_and_loads_in_compressai_as_here(name: str) -> None:
    path = checkpoint.zoo()[name]
    content = checkpoint.read(path)
    assert path.stat().st_size < (9e6 if content["architecture"] == "block-transform" else 3e6)
    theirs = type(build(content["architecture"], 8, 12)).from_state_dict(content["state_dict"])
    theirs.update()
    ours = checkpoint.load(name).model.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("architecture", HYPERPRIORS)
def test_stages_and_analyse_equal_compressais_forward(architecture: str) -> None:
    model = fresh(architecture).model
    torch.manual_seed(1)
    x = torch.rand(2, 3, 64, 128)
    with torch.no_grad():
        expected = model(x)
        y, z = analyse(model, x)
        z_hat = dequantize_z(model, z)
        seen: list[Stage] = []

        def serve(stage: Stage) -> torch.Tensor:
            seen.append(stage)
            return torch.round(model.g_a(x) - stage.means) + stage.means

        y_hat = adapt(model).drive((z_hat,), serve)[1]
        _, likelihood = model.gaussian_conditional(model.g_a(x), seen[0].scales, means=seen[0].means)
    assert len(seen) == 1 and torch.equal(model.g_s(y_hat), expected["x_hat"])
    assert torch.equal(likelihood, expected["likelihoods"]["y"])
    assert y.dtype == torch.float16 and z.dtype == torch.int32


def test_lanes_are_channels_and_steps_are_raster_positions() -> None:
    means = torch.zeros(2, 3, 4, 5)
    values = torch.arange(120.0).reshape(2, 3, 4, 5)
    stage = Stage(means, means)
    lanes = stage.to_lanes(values)
    assert lanes.shape == (6, 20) and lanes[4, 7] == values[1, 1, 1, 2]
    assert torch.equal(stage.from_lanes(lanes), values)


def test_digests_see_their_part_and_no_other() -> None:
    model = fresh().model
    before = encoder_digest(model), entropy_digest(model)
    with torch.no_grad():
        model.g_s[0].weight[0, 0, 0, 0] += 1
    assert (encoder_digest(model), entropy_digest(model)) == before
    with torch.no_grad():
        model.h_s[0].weight[0, 0, 0, 0] += 1
    assert encoder_digest(model) == before[0] and entropy_digest(model) != before[1]
    with torch.no_grad():
        model.entropy_bottleneck.quantiles[0, 0, 1] += 0.25
    assert encoder_digest(model) != before[0]


OF_THE_ZOO = {  # the first digits of the digests of encoder, entropy model and decoder
    "base-0.0018": ("0f6197aaff7397cf", "4a015e3df5198aba", "f061a559bc0f387b"),
    "base-0.0035": ("0bab9f1955ee2398", "3d3d389a4ffd02f2", "53346787aa1f1661"),
    "base-0.0067": ("5d1e3fa25b11fdee", "88233d20e5834f0d", "7b3592dab54bb7ff"),
    "base-0.013": ("96032f589805d3e9", "2cde992c762954c1", "4b396aeccd51b4ca"),
    "base-0.025": ("ef1e5099afb2eb94", "6aad58767314a94f", "30daf634e4f37212"),
    "base-0.0483": ("b8a9be56974af7ba", "6237bdf5bc05ba15", "e514b5990c5dd10c"),
    "base-small": ("c95e3d2cceaa293e", "9c73ee48c3e76f25", "be898e8d19b90716"),
}


@pytest.mark.parametrize("name", sorted(checkpoint.zoo()))
def test_digests_that_stores_and_files_carry_do_not_drift(name: str) -> None:
    model = checkpoint.load(name).model
    found = (encoder_digest(model), entropy_digest(model), decoder_digest(model))
    assert tuple(digest[:16] for digest in found) == OF_THE_ZOO[name]


def test_recipes_train_their_part_only() -> None:
    model = fresh().model
    for recipe, parts in RECIPES.items():
        prefixes = tuple(prefix for part in parts for prefix in family("mbt2018-mean").prefixes(part))
        count = len(freeze_all_but(model, trainable(model, recipe)))
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert len(names) == count > 0 and all(name.startswith(prefixes) for name in names), recipe
        assert trainable(model, parts) == tuple(names)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert {name.split(".")[0] for name in frozen} == {"g_a", "h_a", "entropy_bottleneck"}  # the quantiles of the last
    assert trainable(model, ["g_s.6", "h_s.0.weight"]) == ("g_s.6.weight", "g_s.6.bias", "h_s.0.weight")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (["decodr"], "nothing is named 'decodr'"),
        (["decoder", "g_a.0"], "g_a.0.bias belongs to the encoder"),
        (["entropy_bottleneck"], "quantiles belongs to the encoder"),
    ],
)
def test_recipes_that_name_nothing_or_the_encoder_are_one_line(recipe: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainable(fresh().model, recipe)


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint"):
        checkpoint.load(str(tmp_path / "none.pth.tar"))
    (tmp_path / "text.pth.tar").write_text("hello")
    with pytest.raises(LicError, match="not a checkpoint"):
        checkpoint.load(str(tmp_path / "text.pth.tar"))
    torch.save({"state_dict": {"a": torch.zeros(1)}, "architecture": "mbt2018-mean", "lmbda": 0.1}, tmp_path / "o.tar")
    with pytest.raises(LicError, match="no image codec"):
        checkpoint.load(str(tmp_path / "o.tar"))
    made = fresh()
    torch.save({"state_dict": made.model.state_dict()}, tmp_path / "plain.tar")
    with pytest.raises(UsageError, match="lmbda"):
        checkpoint.load(str(tmp_path / "plain.tar"))
    assert checkpoint.load(str(tmp_path / "plain.tar"), "mbt2018-mean", 0.01).spec == ModelSpec(
        "mbt2018-mean", 8, 12, 0.01
    )
    with pytest.raises(LicError, match="does not fit"):
        checkpoint.load(str(tmp_path / "plain.tar"), "bmshj2018-hyperprior", 0.01)
    with pytest.raises(UsageError, match="unknown architecture"):
        checkpoint.load(str(tmp_path / "plain.tar"), "vgg", 0.01)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    import pickle

    class Harm:
        def __reduce__(self) -> tuple:
            return print, ("code was run",)

    torch.save({"state_dict": Harm()}, tmp_path / "harm.tar", pickle_module=pickle)
    with pytest.raises(LicError, match="not a checkpoint"):
        checkpoint.load(str(tmp_path / "harm.tar"), "mbt2018-mean", 0.01)


def test_a_base_still_reads_what_0_1_0_wrote_with_it_by_default() -> None:
    """Of lic_dist 0.1.0's transform-0.013: the same tensors, and the record that `encode` took where none was named."""
    loaded = checkpoint.load("base-0.013")
    assert (
        record_by_id(loaded, bytes.fromhex("32e31405")).digest
        == QuantizerRecord.from_json(loaded.quantizers["tcq32-0.1.0-cached"]).digest
    )
    assert preferred_quantizer(loaded) == "tcq32"


def test_a_record_fits_its_model_on_every_cpu_and_no_other_model() -> None:
    """The last bits of a prior's floats, and by them a few integers of its tables, depend on the kind of CPU."""
    loaded = {name: checkpoint.load(name) for name in ("base-0.013", "base-0.025")}
    record = QuantizerRecord.from_json(loaded["base-0.013"].quantizers["tcq8"])
    assert fits(record, loaded["base-0.013"].model) and not fits(record, loaded["base-0.025"].model)
    place = 0, int(np.diff(record.z_tables.cdf[0]).argmax())  # of the likeliest symbol, which has room
    for by, fit in ((1, True), (1000, False)):
        cdf = record.z_tables.cdf.copy()
        cdf[place] += by
        altered = replace(record, z_tables=replace(record.z_tables, cdf=cdf))
        assert fits(altered, loaded["base-0.013"].model) == fit


@pytest.mark.slow
def test_the_zoo_loads_and_is_small() -> None:
    for name, path in checkpoint.zoo().items():
        loaded = checkpoint.load(name)
        assert path.stat().st_size <= 9_000_000 and loaded.history and loaded.spec.architecture in ARCHITECTURES
    assert sum(path.stat().st_size for path in checkpoint.zoo().values()) < 60_000_000  # PyPI takes 100
