from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lic_dist import config
from lic_dist.config import yaml_file
from lic_dist.config.sweeps import expand
from lic_dist.errors import UsageError


def write(path: Path, document: object) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


def test_defaults_and_overrides(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", {"name": "x", "train": {"N": 16}})
    experiment = config.load(file, ["train.lr=1e-3", "train.lmbda=0.05", "quantizer.step=0.7"])
    assert experiment.train is not None and experiment.quantizer is not None
    assert (experiment.train.N, experiment.train.lr, experiment.train.lmbda) == (16, 1e-3, 0.05)
    assert experiment.quantizer.step == 0.7 and experiment.quantizer.lambda_scale == "auto"
    assert experiment.model is None


@pytest.mark.parametrize(
    ("document", "near"),
    [
        ({"quantiser": {}}, "quantizer"),
        ({"quantizer": {"lamda_scale": 1}}, "quantizer.lambda_scale"),
        ({"finetune": {"step": 5}}, "finetune.steps"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, document: dict, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.load(write(tmp_path / "a.yaml", document))
    assert near in caught.value.hint and "unknown key" in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "- a\n",
        "a: [",
        "",
        "train: {N: many}",
        "images: {path: x, crop: 100}",
        "quantizer: {states: 5}",
        "quantizer: {step: 0}",
        "quantizer: {group: sq}",
        "evaluate: {images: x, quantizers: []}",
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        config.load(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_section(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="no section 'train'"):
        config.need(config.load(write(tmp_path / "a.yaml", {"name": "x"})).train, "train")


@pytest.mark.parametrize("override", ["train.N", "=3", "name.x=3"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(UsageError):
        config.load(write(tmp_path / "a.yaml", {"name": "x"}), [override])


def test_canonical_json_is_the_same_for_equal_files(tmp_path: Path) -> None:
    one = config.load(write(tmp_path / "a.yaml", {"name": "x", "train": {"N": 16, "M": 32}}))
    two = config.load(write(tmp_path / "b.yaml", {"train": {"M": 32, "N": 16}, "name": "x"}))
    assert one.canonical_json() == two.canonical_json()
    assert config.Experiment.model_validate_json(one.canonical_json()) == one


def test_every_experiment_file_of_the_repository_is_valid() -> None:
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert files
    for file in files:
        found = list(expand(file))
        assert found
        if "--jobs 2" in file.read_text():  # which Ray's engine refuses
            assert {one.engine.name for one in found} == {"local"}, file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("images:\n  path: x\n  crop: 128\n  crop: 256\n", "key 'crop' stands twice, in lines 3 and 4"),
        ("images: {path: x}\nname: y\nimages: {path: x}\n", "key 'images' stands twice, in lines 1 and 3"),
        ("sweep: {train.lr: [1], train.lr: [2]}\n", "key 'train.lr' stands twice, in line 1"),
        ("a: &b {c: 1}\nd: {<<: *b, e: 1, e: 2}\n", "key 'e' stands twice, in line 2"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        config.load(tmp_path / "a.yaml")
    assert caught.value.message.endswith(said)
    with pytest.raises(UsageError, match="stands twice"):
        config.load(write(tmp_path / "b.yaml", {"name": "x"}), ["train={N: 1, N: 2}"])


@pytest.mark.parametrize(
    ("written", "held_out"),
    [
        ("5e-1", 0.5),
        ("'0.05'", 0.05),
        ("5%", 0.05),
        ("5 %", 0.05),
        ("'5e-2'", 0.05),
        (".05", 0.05),
        ("0", 0),
        ("./valid", "valid"),
        ("valid/", "valid/"),  # as the identity of stores has it
        ("a//b", "a/b"),
        ("'2020'", "./2020"),
    ],
)
def test_a_part_to_hold_out_is_a_number_however_it_is_written(tmp_path: Path, written: str, held_out: object) -> None:
    (tmp_path / "a.yaml").write_text(f"images: {{path: x, held_out: {written}}}")
    for file, overrides in (
        (tmp_path / "a.yaml", []),
        (write(tmp_path / "b.yaml", {}), [f"images.held_out={written}"]),
    ):
        if overrides:
            overrides.append("images.path=x")
            file.write_text("name: y")
        experiment = config.load(file, overrides)
        assert experiment.images is not None and experiment.images.held_out == held_out
        again = config.Experiment.model_validate(experiment.model_dump(mode="json"))
        assert again.images == experiment.images


@pytest.mark.parametrize(
    "written", ["5", "1", "100%", "-1%", ".nan", "''", "/valid", "../valid", ".", "[valid]", "true"]
)
def test_what_can_not_be_held_out_is_said_in_plain_words(tmp_path: Path, written: str) -> None:
    (tmp_path / "a.yaml").write_text(f"images: {{path: x, held_out: {written}}}")
    with pytest.raises(UsageError, match="must be a part, at least 0 and below 1"):
        config.load(tmp_path / "a.yaml")


@pytest.mark.parametrize(("written", "found"), [("2", (2, 2)), ("2..8", (2, 8)), ("'3'", (3, 3)), ("1..1", (1, 1))])
def test_a_pool_is_a_number_or_a_range(tmp_path: Path, written: str, found: tuple[int, int]) -> None:
    engine = config.load(write(tmp_path / "a.yaml", {}), [f"engine.encoders={written}"]).engine
    assert config.bounds(engine.encoders) == found


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("8..2", "engine.trainers: the range begins above its end: 2..8?"),
        ("0..2", "must be a whole number of at least 1 or a range like 2..8, not '0..2'"),
        ("2-8", "must be a whole number of at least 1 or a range like 2..8, not '2-8'"),
        ("true", "engine.trainers: true and false are no numbers"),
    ],
)
def test_what_is_no_pool_is_said_in_plain_words(tmp_path: Path, written: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.load(write(tmp_path / "a.yaml", {}), [f"engine.trainers={written}"])
    assert said in caught.value.message


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [1e-4, 5E-2, 1., .5, 1_000, 010, no, on, 2024-01-01, 1:30, 1e5x, +1, .inf]")
    assert yaml_file.read(tmp_path / "a.yaml") == [
        {"a": [1e-4, 0.05, 1, 0.5, 1000, 10, "no", "on", "2024-01-01", "1:30", "1e5x", 1, float("inf")]}
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_empty_documents_are_passed_over(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.yaml").write_bytes("---\r\n---\r\nname: é\r\n---\r\n# no more\r\n".encode(encoding))
    assert config.load(tmp_path / "a.yaml").name == "é"


def test_homes_and_variables_expand_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    paths = {
        "train": {"out": "~/r", "start": "~/s"},
        "model": {"checkpoint": "~/m"},
        "images": {"path": "~"},
        "cache": {"path": "~/c.zarr"},
        "finetune": {"out": "$SCRATCH/f"},
        "evaluate": {"images": "~/k", "checkpoints": {"~/a": ["~/q"]}, "quantizers": ["sq", "~/q"], "out": "~/e"},
        "report": {"anchors": ["base sq"], "out": "${SCRATCH}/r"},
    }
    found = config.load(write(tmp_path / "a.yaml", paths)).canonical_json()
    assert "~" not in found and "$" not in found and found.count("/home/me") == 10 and found.count("/scratch/") == 2
    paths["cache"]["path"] = "s3://bucket/~/$x.zarr"
    url = config.load(write(tmp_path / "a.yaml", paths)).cache
    assert url is not None and url.path == "s3://bucket/~/$x.zarr"
    for path, said in (("~nobody-here/x", "no home folder"), ("$NOT_SET_HERE/x", "is not set"), ("", "empty")):
        with pytest.raises(UsageError, match=said):
            config.load(write(tmp_path / "a.yaml", {"cache": {"path": path}}))


@pytest.mark.parametrize(
    ("quantizer", "group"),
    [
        ({}, "tcq8"),
        ({"states": 4}, "tcq4"),
        ({"name": "sq"}, "sq-adapted"),
        ({"name": "rdoq", "group": "auto"}, "rdoq"),
        ({"name": "deadzone"}, "deadzone"),
        ({"name": "rdoq", "group": "mine"}, "mine"),
    ],
)
def test_a_group_is_named_by_its_quantizer(quantizer: dict, group: str) -> None:
    assert config.Quantizer(**quantizer).group == group


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("finetune: {streams: 0}", "finetune.streams must be a whole number of at least 1 or auto, not 0"),
        ("quantizer: {step: Auto}", "quantizer.step must be a number above 0 or auto, not 'Auto'"),
        ("quantizer: {states: '8'}", "4, 8, 16, 32 or 64, not '8' (a number stands without quotes)"),
        ("finetune: {recipe: 5}", "all-but-encoder, boundary, adapters or a list of texts (one at least), not 5"),
        ("train: {distortion: {mse: 1, ssim: 2}}", "mapping from mse, ms-ssim or lpips to numbers above 0, not {"),
        ("finetune: {phases: [{recipe: decoder, steps: 1, lr: 0}]}", "finetune.phases.0.lr must be a number above 0"),
        ("train: {lr: true}", "train.lr must be a number above 0, not True"),
        ("cache: {path: x, shard: yes}", "cache.shard must be a whole number of at least 1"),
        ("finetune: {phases: [{recipe: decoder, stesp: 1}]}", "did you mean 'steps'"),
        ("evaluate: {images: x, quantizers: sq}", "a list stands in brackets: [sq]"),
        ("evaluate: {images: x, checkpoints: {a: sq}}", "a list of texts or a mapping from names to lists of texts"),
        ("evaluate: {}", "evaluate.images is missing (Folder of the test pictures, or a URL"),
        ("model: base-small", "model must be a section with keys of its own, not 'base-small' (model: {checkpoint: b"),
        ("name: 2024", 'name must be a text, not 2024 (a text that looks like a number stands in quotes: "2024")'),
        ("1: 2", "unknown key '1'"),
        ("images.path: x", "sections hold their keys: images: {path: photos/}"),
        ("lr: 1", "did you mean 'train.lr' or 'finetune.lr'?"),
        ("images: {lr: 1}", "did you mean 'train.lr' or 'finetune.lr'?"),
        ("Images: {path: x}", "did you mean 'images'?"),
        ("images: {zzz: 1}", "images has the keys path, crop, variations"),
        ("fast: {finetune.stepp: 3}", "unknown key 'finetune.stepp' (did you mean 'finetune.steps'?)"),
        ("a:\n\tb: 1", "line 2: "),
        ("x: &x [*x]", "unknown key 'x'"),
    ],
)
def test_a_fault_is_said_in_plain_words(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        list(expand(tmp_path / "a.yaml"))
    told = str(caught.value)
    assert said in told and "\n" not in told
    assert not any(noise in told for noise in ("literal_error", "Input should", "constrained", "function-", "pydantic"))


def test_a_file_that_is_not_text_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"PK\x03\x04\x00\xff")
    with pytest.raises(UsageError, match="it is not text in UTF-8"):
        config.load(tmp_path / "a.yaml")


def test_an_emptied_section_is_an_absent_one(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("engine:\nmodel:\nsweep:\nfast:\n")
    assert list(expand(tmp_path / "a.yaml")) == [config.Experiment()]
