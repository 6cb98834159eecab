"""Packs: exact merging, a base that is checked, files that parse to themselves and refuse all others."""

from __future__ import annotations

import copy
import hashlib
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lic_dist.errors import LicError
from lic_dist.evaluation.bitstreams import _file_of
from lic_dist.models import adapters, checkpoint, packs
from lic_dist.models.names import label, split_pack, with_pack
from lic_dist.models.packs import Delta, Pack
from lic_dist.models.parts import encoder_digest, entropy_digest, model_digest
from tests.fuzz_packs import joined, mutated, one_input, parts_of, seeds


def moved(model: nn.Module, parts: tuple[str, ...], rank: int, by: float = 0.01) -> dict[str, torch.Tensor]:
    """Attach adapters and move them; the weights as they compute."""
    torch.manual_seed(1)
    names = adapters.attach(model, dict.fromkeys(parts, rank), seed=0)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).add_(by * torch.randn_like(model.get_parameter(name)))
        return {name: getattr(owner, attribute).clone() for name, owner, attribute in adapters._attached(model)}


def packed(base: Path, parts: tuple[str, ...] = ("decoder", "hyper"), rank: int = 1) -> Pack:
    loaded = checkpoint.load(str(base))
    moved(loaded.model, parts, rank)
    deltas = adapters.detach(loaded.model)
    return Pack(checkpoint.weights_digest(loaded.model), "base", deltas, {}, {"what": "finetuning"})


@pytest.mark.parametrize("rank", [0, 3])
def test_merging_is_the_exact_sum_rounded_once(rank: int) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 5, 2, 2, generator=generator)
    if rank:
        delta = Delta.of_factors((6, 5, 2, 2), *(torch.randn(side, generator=generator) for side in ((6, 3), (3, 20))))
    else:
        delta = Delta.free(0.1 * torch.randn(weight.shape, generator=generator))
    merged, w = delta.added_to(weight).reshape(6, 20), weight.reshape(6, 20)
    for row, column in ((0, 0), (2, 7), (5, 19)):
        exact = Fraction(float(w[row, column]))
        if rank:
            for number in range(rank):
                product = int(delta.left[row, number]) * int(delta.right[number, column])
                exact += product * Fraction(2) ** int(delta.exponents[number])
        else:
            exact += int(delta.left[row, column]) * Fraction(2) ** int(delta.exponents[row])
        assert np.float32(float(exact)) == float(merged[row, column])


@pytest.mark.parametrize("scale", [1e-9, 0.02, 3.0])
def test_integers_are_near_and_zero_is_zero(scale: float) -> None:
    generator = torch.Generator().manual_seed(2)
    values, zero = scale * torch.randn(7, 30, generator=generator), torch.zeros(7, 30)
    found = Delta.free(values)
    assert float((found.added_to(zero) - values).norm() / values.norm()) < 0.01
    left, right = scale * torch.randn(7, 2, generator=generator), torch.randn(2, 30, generator=generator)
    found = Delta.of_factors((7, 30), left, right)
    assert float((found.added_to(zero) - left @ right).norm() / (left @ right).norm()) < 0.02
    weight = torch.randn(7, 30, generator=generator)
    for none in (Delta.free(zero), Delta.of_factors((7, 30), zero[:, :2], right)):
        assert torch.equal(none.added_to(weight), weight)


def test_adapters_leave_the_model_as_it_was_and_the_pack_computes_what_they_did(base: Path) -> None:
    loaded = checkpoint.load(str(base))
    before, model = loaded.model.state_dict(), copy.deepcopy(loaded.model)
    names = adapters.attach(model, {"decoder": 1, "hyper": 1}, seed=0)
    kinds = {type(owner.parametrizations[name][0]) for _, owner, name in adapters._attached(model)}  # type: ignore[union-attr, index]
    assert kinds == {adapters.LowRank, adapters.Free}
    assert all(name.startswith(("g_s.", "h_s.")) for name in names)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(x)["x_hat"], loaded.model(x)["x_hat"])  # zero at the start
    adapters.detach(model)
    computed = moved(model, ("decoder", "hyper"), 1)
    deltas = adapters.detach(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merged = Pack(checkpoint.weights_digest(model), "base", deltas).merged(before)
    for name, value in merged.items():
        if name in computed:
            assert float((value - computed[name]).norm() / (computed[name] - before[name]).norm()) < 0.05
        else:
            assert value is before[name]


def test_a_pack_is_loaded_by_name_and_has_a_digest_of_its_own(base: Path, tmp_path: Path) -> None:
    pack = packed(base)
    packs.save(pack, tmp_path / "screen.pack")
    name = f"{base}+{tmp_path / 'screen.pack'}"
    parent, loaded = checkpoint.load(str(base)), checkpoint.load(name)
    assert loaded.source == name and loaded.quantizers == {} and loaded.spec == parent.spec
    assert loaded.history == [*parent.history, {"what": "finetuning", "pack": pack.digest}]
    assert encoder_digest(loaded.model) == encoder_digest(parent.model)
    assert entropy_digest(loaded.model) != entropy_digest(parent.model)
    again = pack.merged(parent.model.state_dict())
    assert checkpoint.weights_digest(loaded.model) == checkpoint.digest(
        {name: value for name, value in again.items() if not name.endswith(checkpoint.COMPUTED)}
    )
    (tmp_path / "merged.pth.tar").write_bytes(_file_of(name))  # what an archive of bitstreams keeps
    archived = checkpoint.load(str(tmp_path / "merged.pth.tar"))
    assert model_digest(archived.model) == model_digest(loaded.model) and archived.history == loaded.history
    with pytest.raises(LicError, match="this pack is of another model than .*screen.pack") as caught:
        checkpoint.load(with_pack(name, str(tmp_path / "screen.pack")))  # twice
    assert caught.value.hint and "it is of 'base'" in caught.value.hint
    with pytest.raises(LicError, match="cannot read the pack .*none.pack"):
        checkpoint.load(f"{base}+{tmp_path / 'none.pack'}")
    with pytest.raises(LicError, match="'g_s.9.weight', which the model does not have"):
        Pack("", "", {"g_s.9.weight": Delta.free(torch.ones(3))}).merged(parent.model.state_dict())


def test_names_with_packs() -> None:
    assert split_pack("base-0.013+a/b.pack") == ("base-0.013", "a/b.pack")
    assert split_pack("base+a.pack+b.pack") == ("base+a.pack", "b.pack") and split_pack("c++/x") == ("c++/x", "")
    assert label("runs/x/checkpoint.pth.tar+a/b.pack") == "x+b" and label("vbr@3+b.pack") == "vbr@3+b"


def test_a_file_is_parsed_to_itself_and_any_other_is_refused(base: Path) -> None:
    data = packed(base).data
    assert Pack.parse(data).data == data
    for cut in (0, 3, 7, 20, 44, len(data) - 1):
        with pytest.raises(LicError):
            Pack.parse(data[:cut])
    for place in random.Random(0).sample(range(len(data)), 50):
        with pytest.raises(LicError):
            Pack.parse(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    newer = data[:7] + b"\x02" + data[8:]
    with pytest.raises(LicError, match="has format 2; this program reads format 1"):
        Pack.parse(newer)


def test_the_format_stays() -> None:
    whole = [np.array(values, np.int8) for values in ([-3, 1], [[1, -2], [3, 4]], [[5, 6, 7], [-8, 9, 127]])]
    vector = Delta((2,), 0, np.array([-20], np.int8), np.array([[-127, 1]], np.int8), np.empty((0, 2), np.int8))
    pack = Pack("ab", "base", {"w": Delta((2, 3, 1, 1), 2, *whole), "b": vector}, {"sq": "{}"}, {"steps": 3})
    header, numbers = parts_of(pack.data)
    assert pack.data[:8] == b"LICPACK\x01" and hashlib.sha256(pack.data[40:]).digest() == pack.data[8:40]
    assert header == (
        b'{"base": "ab", "of": "base", "deltas": [["w", [2, 3, 1, 1], 2], ["b", [2], 0]], '
        b'"quantizers": {"sq": "{}"}, "entry": {"steps": 3}}'
    )
    assert list(np.frombuffer(numbers, np.int8)) == [-3, 1, 1, -2, 3, 4, 5, 6, 7, -8, 9, 127, -20, -127, 1]
    merged = Pack.parse(pack.data).merged({"w": torch.ones(2, 3, 1, 1), "b": torch.zeros(2)})
    assert merged["w"].flatten().tolist() == [33.625, -34.25, -506.125, -61.125, 75.25, 1019.625]
    assert merged["b"].tolist() == [-127 * 2.0**-20, 2.0**-20]


def test_numbers_beyond_floats_are_refused() -> None:
    header, numbers = parts_of(seeds()[0])
    hostile = joined(header.replace(b'"steps": 3', b'"steps": 1e999'), numbers)
    with pytest.raises(LicError, match="1e999 is no number"):
        Pack.parse(hostile[:8] + hashlib.sha256(hostile[40:]).digest() + hostile[40:])


@given(st.integers(0, 1 << 32))
def test_hostile_packs_are_refused_or_whole(seed: int) -> None:
    one_input(mutated(random.Random(seed)))
