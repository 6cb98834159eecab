"""Templates: what a placeholder stands for, and what is said of one that stands for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lic_dist import config
from lic_dist.config import Experiment
from lic_dist.config.experiment import parse
from lic_dist.config.faults import keys
from lic_dist.config.templates import text_of
from lic_dist.config.yaml_file import PLACEHOLDER
from lic_dist.errors import UsageError

WORDS = st.from_regex(r"[a-z_0-9]{1,8}(\.[a-z_0-9]{1,8}){0,2}", fullmatch=True)


def name_of(template: str, **sections: Any) -> str:
    return parse({"name": template, **sections}, "a.yaml").name


def refusal(**document: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse(document, "a.yaml")
    assert "\n" not in str(caught.value) and caught.value.message.startswith("a.yaml: ")
    return caught.value


@pytest.mark.slow
@given(st.text())
def test_a_text_without_placeholders_stays_as_it_is(text: str) -> None:
    if not PLACEHOLDER.search(text):
        assert name_of(text) == text


@pytest.mark.parametrize("text", ["{}", "{a b}", "{1,2}", "{a-b}", "{lr:g}", "{.a}", "{a.}", "${name}", "{{", "}{"])
def test_braces_around_anything_else_stay(text: str) -> None:
    assert name_of(text) == text


@given(WORDS)
def test_an_unknown_placeholder_is_named(word: str) -> None:
    known = {"name", "model.name", *(one for one, _, _ in keys(Experiment) if "." in one)}
    if word not in known:
        assert f"name: unknown placeholder {{{word}}}" in str(refusal(name=f"a{{{word}}}b"))


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=1e-300, exclude_min=True))
def test_a_number_is_short_and_the_same_number(value: float) -> None:
    text = name_of("{finetune.lr}", finetune={"lr": value})
    assert float(text) == value and len(text) <= len(repr(value))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-4, "0.0001"),
        (3e-5, "3e-05"),
        (13.0, "13"),
        (0.0067, "0.0067"),
        (1 / 3, "0.3333333333333333"),
        (8, "8"),
        (True, "true"),
        (("a", "b"), "a+b"),
        (Path("runs/x"), "runs/x"),
        (None, None),
        ({"mse": 1.0}, None),
        ((config.Phase(recipe="decoder", steps=1, lr=1),), None),
    ],
)
def test_the_text_of_a_value(value: Any, text: str | None) -> None:
    assert text_of(value) == text


@pytest.mark.parametrize("written", [1e-4, "1e-4", "0.0001"])
def test_equal_values_have_one_text(written: object) -> None:
    assert name_of("{finetune.lr}", finetune={"lr": written}) == "0.0001"


def test_every_name_path_and_reference_is_a_template() -> None:
    found = parse(
        {
            "name": "{model.name}-{train.lmbda}",
            "train": {"start": "runs/{train.seed}", "out": "runs/base-{train.lmbda}"},
            "model": {"checkpoint": "{train.out}/checkpoint.pth.tar"},
            "images": {"path": "photos-{images.crop}", "held_out": "{quantizer.name}"},
            "quantizer": {"group": "{quantizer.name}.{quantizer.states}-{quantizer.shift}"},
            "cache": {"path": "s3://b/{name}.zarr", "options": {"region": "{quantizer.name}"}},
            "finetune": {"recipe": ["h_s.{images.seed}", "decoder"], "out": "runs/{finetune.recipe}-{quantizer.group}"},
            "evaluate": {
                "images": "{images.path}",
                "checkpoints": {"{model.checkpoint}": ["sq"], "{finetune.out}": ["{quantizer.group}", "carried"]},
                "quantizers": ["{cache.path}/quantized/{quantizer.group}"],
                "show": ["{name}.png"],
                "out": "{finetune.out}.json",
            },
            "report": {"anchors": ["{name} sq"], "out": "{evaluate.out}-report"},
        },
        "a.yaml",
    )
    assert found.name == "base-0.013-0.013"
    assert found.train and (found.train.start, str(found.train.out)) == ("runs/0", "runs/base-0.013")
    assert found.model and found.model.checkpoint == "runs/base-0.013/checkpoint.pth.tar"
    assert found.images and (str(found.images.path), found.images.held_out) == ("photos-256", "tcq")
    assert found.quantizer and found.quantizer.group == "tcq.8-auto"
    assert found.cache and found.cache.path == f"s3://b/{found.name}.zarr" and found.cache.options == {"region": "tcq"}
    assert found.finetune and str(found.finetune.out) == "runs/h_s.0+decoder-tcq.8-auto"
    assert found.evaluate and found.evaluate.images == found.images.path
    out = str(found.finetune.out)
    assert found.evaluate.checkpoints == {found.model.checkpoint: ("sq",), out: ("tcq.8-auto", "carried")}
    assert found.evaluate.quantizers == (f"{found.cache.path}/quantized/tcq.8-auto",)
    assert found.evaluate.show == (f"{found.name}.png",) and str(found.evaluate.out) == f"{out}.json"
    assert found.report and found.report.anchors == (f"{found.name} sq",)
    assert str(found.report.out) == f"{out}.json-report"


@pytest.mark.parametrize(
    ("sections", "template", "expected"),
    [
        ({"quantizer": {}}, "{quantizer.group}{quantizer.states}", "tcq88"),
        ({"quantizer": {"name": "sq"}}, "{quantizer.group}", "sq-adapted"),
        ({"model": {"checkpoint": "x", "quality": 3}}, "{model.lmbda}", "0.0067"),
        ({"model": {"checkpoint": "compressai:mbt2018-mean/mse/4"}}, "{model.name}", "4"),
        ({"model": {"checkpoint": "runs/a/checkpoint.pth.tar"}}, "{model.name}", "a"),
        ({"model": {"checkpoint": "runs/b.pth.tar"}}, "{model.name}", "b"),
        ({"model": {"checkpoint": "runs/c/"}}, "{model.name}", "c"),
        ({}, "{engine.name}", "ray"),
    ],
)
def test_defaults_and_what_auto_stands_for_count(sections: dict[str, Any], template: str, expected: str) -> None:
    assert name_of(template, **sections) == expected


def test_homes_and_variables_expand_beside_placeholders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    found = parse({"finetune": {"out": "${SCRATCH}/{finetune.seed}"}, "report": {"out": "~/{name}"}}, "a.yaml")
    assert found.finetune and str(found.finetune.out) == "/scratch/0"
    assert found.report and str(found.report.out) == "/home/me/experiment"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("finetune: {out: '{finetune.recpie}'}", "finetune.out: unknown placeholder {finetune.recpie}"),
        ("finetune: {out: '{finetune.recpie}'}", "(did you mean {finetune.recipe}?)"),
        ("name: '{model.nam}'", "unknown placeholder {model.nam} (did you mean {model.name}?)"),
        ("name: '{lr}'", "did you mean {train.lr} or {finetune.lr}?"),
        ("name: '{train}'", "unknown placeholder {train} ("),
        ("name: '{model.name.x}'", "unknown placeholder {model.name.x} ("),
        ("name: '{finetune.lr}'", "name: {finetune.lr}: the experiment has no section 'finetune' (add 'finetune:'"),
        ("name: '{model.name}'", "name: {model.name}: the experiment has no section 'model'"),
        ("{model: {checkpoint: x}, name: '{model.lmbda}'}", "name: {model.lmbda}: model.lmbda is null"),
        ("{finetune: {}, name: '{finetune.phases}'}", "finetune.phases is empty"),
        ("{cache: {path: x, options: {a: b}}, name: '{cache.options}'}", "is no text, number or list of these"),
        ("name: '{name}'", "name: {name} -> {name} is a circle"),
        ("model: {checkpoint: '{model.name}'}", "{model.checkpoint} -> {model.name} -> {model.checkpoint} is a circle"),
        ("evaluate: {images: x, checkpoints: ['{evaluate.checkpoints}']}", "is a circle"),
        ("{train: {}, evaluate: {images: x, checkpoints: {'{train.out}': [a], runs/base: [b]}}}", "names are the same"),
        ("train: {lr: '{train.lmbda}'}", "train.lr must be a number above 0, not '{train.lmbda}'"),
        ("{name: a/b, quantizer: {group: '{name}'}}", "must be a name of letters, digits and . _ @ -, not 'a/b'"),
        ("{name: sq, quantizer: {group: '{name}'}}", "'sq' is CompressAI's own quantizer"),
    ],
)
def test_what_stands_for_nothing_is_said_in_one_line(text: str, said: str) -> None:
    assert said in str(refusal(**yaml.safe_load(text)))


@given(st.permutations(["train.out", "finetune.out", "evaluate.out", "report.out", "name"]), st.integers(2, 5))
def test_a_circle_of_any_length_is_named(order: list[str], length: int) -> None:
    document: dict[str, Any] = {"evaluate": {"images": "x"}}
    for key, after in zip(order[:length], [*order[1:length], order[0]], strict=True):
        section, _, name = key.partition(".")
        document |= (
            {section: document.get(section, {}) | {name: f"a{{{after}}}"}} if name else {"name": f"a{{{after}}}"}
        )
    said = str(refusal(**document))
    assert said.endswith("is a circle") and all(f"{{{one}}}" in said for one in order[:length])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: {quantizer.group}\n", 'stands in quotes: "{quantizer.group}"'),
        ("name: {train.lr}-x\n", 'stands in quotes: "runs/{train.lr}"'),
        ("finetune: {out: runs/{finetune.lr}}\n", 'stands in quotes: "runs/{finetune.lr}"'),
        ("evaluate: {images: x, checkpoints: [a, {finetune.out}]}\n", 'stands in quotes: "{finetune.out}"'),
    ],
)
def test_a_placeholder_that_yaml_takes_for_a_mapping(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        config.load(tmp_path / "a.yaml")
    assert said in caught.value.hint and "\n" not in str(caught.value)


def test_a_file_without_a_sweep_and_an_override_are_templates(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"finetune": {"out": "runs/{finetune.lr}"}}))
    found = config.load(tmp_path / "a.yaml", ["finetune.lr=3e-5"])
    assert found.finetune and str(found.finetune.out) == "runs/3e-05"
    found = config.load(tmp_path / "a.yaml", ["finetune.out=runs/{finetune.batch}"])
    assert found.finetune and str(found.finetune.out) == "runs/16"
