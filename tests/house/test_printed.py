"""Every line that the README and docs/ print: run on small pictures with few steps, or, where a block is marked dry,
parsed, with the files that it names. See docs/contributing.md."""

from __future__ import annotations

import copy
import fnmatch
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from lic_dist.codec.records import OFFSETS
from lic_dist.config import Experiment
from lic_dist.config.sweeps import documents, expand
from lic_dist.models import checkpoint
from lic_dist.models.names import SUFFIX, split_gain
from lic_dist.training.trainee import CALIBRATED
from tests.conftest import picture
from tests.printed import blocks, calls, lic_dist, make_stubs, parse_command

ROOT = Path(__file__).resolve().parents[2]
README, FIRST = ROOT / "README.md", ROOT / "docs" / "first-hour.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
THEIRS = "checkpoint_best_loss.pth.tar"
SMALL = {  # set in every experiment that has the section
    "images": ("variations=6", "held_out=0.4", "crop=64"),
    "quantizer": ("pilot=8", "calibration=4"),
    "cache": ("shard=8", "batch=4"),
    "finetune": ("steps=2", "batch=4", "evaluate_every=1"),
    "engine": ("name=local", "searchers=1"),
}


def lay_out(folder: Path) -> Path:
    """A clone with pictures in it: configs/, jobs/ and docs/ as they are, photos/ and kodak/ small."""
    for name in ("configs", "jobs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for part, names in (("photos", [f"{n}.png" for n in range(8)]), ("kodak", ["kodim01.png", "kodim23.png"])):
        (folder / part).mkdir()
        for seed, name in enumerate(names):
            Image.fromarray(picture(seed, 96, 128)).save(folder / part / name)
    model = checkpoint.load("base-small").model
    torch.save({"epoch": 9, "state_dict": model.state_dict()}, folder / THEIRS)  # as CompressAI's example training does
    make_stubs(folder)
    return folder


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Run the page from top to bottom; what its Python defines."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.dry:
            continue
        if block.language == "python":
            exec(block.text, names)
        for program, *words in calls(block.text, folder) if block.language == "sh" else ():
            if program == "lic-dist":
                code = lic_dist().main([*words, *small(words)], standalone_mode=False)
                assert code in (None, 0), (words, code)
    return names


def small(words: list[str]) -> Iterator[str]:
    if "--generations" in words:
        yield from ("--generations", "2")
    for file in (Path(word) for word in words if word.endswith(".yaml")):
        given = set().union(*yaml.safe_load_all(file.read_text()))
        for section, settings in SMALL.items():
            for setting in settings if section in given else ():
                yield from ("--set", f"{section}.{setting}")


@pytest.fixture(scope="module")
def after_the_first_hour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = lay_out(tmp_path_factory.mktemp("hour"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_page(FIRST, folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_hour_runs_as_printed(after_the_first_hour: Path) -> None:
    made = after_the_first_hour
    assert (made / "runs/report/report.html").stat().st_size > 10_000
    with Image.open(made / "kodak/kodim23.png") as original, Image.open(made / "a-decoded.png") as decoded:
        assert original.size == decoded.size


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if page != FIRST], ids=lambda p: p.name)
def test_every_other_page_runs_after_the_first_hour(
    page: Path, after_the_first_hour: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(after_the_first_hour)
    names = run_page(page, after_the_first_hour)
    if page.name == "python-api.md":
        assert names["level"].shape == (16, 72, 4, 4) and names["sample"]["pixels"].shape == (3, 64, 64)
        assert names["rows"]["quantized/tcq8/k"].shape == (16, 72, 4, 4) and names["rates"].sizes == {"held_out": 2}


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    """A clone, in which nothing runs, and what the first hour would make there."""
    folder, made = lay_out(tmp_path_factory.mktemp("parsed")), Made()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made.follow(FIRST, folder)
    return folder, made


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse_and_name_what_is_there(
    page: Path, parsed: tuple[Path, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = parsed
    monkeypatch.chdir(folder)
    made = Made() if page in (FIRST, README) else copy.deepcopy(first)
    made.follow(page, folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_experiments_that_are_shown_are_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml" and yaml.safe_load(block.text):
            (tmp_path / "a.yaml").write_text(block.text)
            assert list(expand(tmp_path / "a.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_exist(page: Path) -> None:
    for line in re.findall(r"`lic-dist ([a-z][^`|>]*)(?: >[^`]*)?`", page.read_text()):
        words = [word for word in line.split() if word != "..."]
        group = lic_dist().commands.get(words[0])
        if len(words) > 1 or not hasattr(group, "commands"):
            try:
                parse_command(words)
            except Exception as error:  # text may leave arguments and values out
                assert type(error).__name__ in ("MissingParameter", "BadOptionUsage"), (line, error)


def test_every_way_out_of_running_a_block_says_why() -> None:
    for page in PAGES:
        marks = page.read_text().count("<!-- dry: ")
        assert marks - ("`<!-- dry: why -->`" in page.read_text()) == sum(bool(block.dry) for block in blocks(page))


@dataclass
class Made:
    """What the lines so far would have made, so that none names a checkpoint, group or file that is not there."""

    checkpoints: set[str] = field(default_factory=lambda: {*checkpoint.zoo(), THEIRS})
    groups: set[str] = field(default_factory=set)  # store/quantized/group, and the records that `cache adapt` writes
    files: set[str] = field(default_factory=set)

    def follow(self, page: Path, folder: Path) -> None:
        for block in blocks(page):
            for program, *words in calls(block.text, folder) if block.language == "sh" else ():
                if program == "lic-dist":
                    self.command(words)
                elif program == "torchrun":
                    self.command(under_torchrun(words))
                elif program == "sbatch":
                    script, *rest = (word for word in words if not word.startswith("-"))
                    assert script == "jobs/slurm.sbatch"
                    self.command(["cache", "build", *rest])
                    self.command(["finetune", *rest])
                elif program == "pip":
                    check_extras(words)

    def command(self, words: list[str]) -> None:
        name = parse_command(words)
        sets = [word for option, word in zip(words, words[1:], strict=False) if option == "--set"]
        for file in (Path(word) for word in words if word.endswith(".yaml")):
            if str(file) in self.files:
                continue  # written by a command; its own tests read it
            for document in documents(file, sets, fast="--fast" in words):
                for stage in [name.split()[-1]] if name != "run" else ["train", "build", "finetune", "evaluate"]:
                    for one in document:
                        self.stage(stage, one)
        if name == "quickstart":
            self.files |= {"runs/quickstart/experiment.yaml", "runs/quickstart/evaluation.json"}
        if name == "init":
            self.files |= {f"{words[1]}/experiment.yaml", f"{words[1]}/evaluation.json"}
            self.checkpoints.add(f"{words[1]}/finetuned")
            self.has(words[words.index("--checkpoint") + 1])
        if "--icechunk" in words:  # the repository has the groups of the store
            store, made = words[words.index("export") + 1], words[words.index("--icechunk") + 1]
            self.groups |= {
                f"icechunk://{made}{one.removeprefix(store)}" for one in self.groups if one.startswith(store)
            }
        if name == "report":
            results = [word for word in words if word.endswith(".json")]
            assert all(result in self.files or Path(result).exists() for result in results), results
        if "--model" in words:
            self.has(words[words.index("--model") + 1])

    def stage(self, stage: str, one: Experiment) -> None:
        if stage == "train" and one.train is not None:
            assert one.train.start is None or self.has(one.train.start)
            self.checkpoints.add(str(one.train.out))
        if stage in ("build", "cache", "adapt", "requantize") and one.cache and one.quantizer and one.model:
            self.has(one.model.checkpoint)
            self.groups.add(f"{one.cache.path}/quantized/{one.quantizer.group}")
            self.groups.add(f"{Path(one.cache.path).with_suffix('')}.{one.quantizer.group}.json")
        if stage == "finetune" and one.finetune and one.cache and one.quantizer:
            assert f"{one.cache.path}/quantized/{one.quantizer.group}" in self.groups, one.name
            rounds = [f"{one.finetune.out}/round-{n + 1}" for n in range(one.finetune.rounds)]
            self.checkpoints |= {str(one.finetune.out), *(rounds if one.finetune.rounds > 1 else ())}
            if one.finetune.int8:
                self.checkpoints.add(f"{one.finetune.out}/{CALIBRATED}{SUFFIX}")
        if stage == "evaluate" and one.evaluate:
            chosen = one.evaluate.checkpoints or (one.model.checkpoint if one.model else "",)
            given = chosen if isinstance(chosen, dict) else dict.fromkeys(chosen, one.evaluate.quantizers)
            for name, quantizers in given.items():
                self.has(name)
                for quantizer in quantizers:
                    assert self.knows(quantizer, one), (one.name, quantizer)
            self.files.add(str(one.evaluate.out))

    def has(self, name: str) -> bool:
        if not name.startswith("compressai:"):
            assert fnmatch.filter(self.checkpoints, split_gain(name)[0]), f"no line before makes {name}"
        return True

    def knows(self, quantizer: str, one: Experiment) -> bool:
        carried = {name.rsplit("/", 1)[-1] for name in self.groups}
        shipped = {"sq", "carried", "sq-adapted", "rdoq", "tcq4", "tcq8"}  # the last four: carried by the zoo's
        quantizer = quantizer.removesuffix(OFFSETS)
        of_the_store = {f"{one.cache.path}/quantized/{quantizer}"} if one.cache else set()
        return quantizer in shipped | carried | self.groups or bool(of_the_store & self.groups)


def under_torchrun(words: list[str]) -> list[str]:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    if given.module:
        assert given.training_script == "lic_dist"
        return given.training_script_args
    assert given.training_script == "jobs/finetune.py"
    return ["finetune", *given.training_script_args]


def check_extras(words: list[str]) -> None:
    """Extras install from a clone, as -e '.[name]'; the package is in no registry."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = words[words.index("-e") + 1]
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", wanted)
    assert extras, words
    assert set(filter(None, (extras[1] or "").split(","))) <= set(project["optional-dependencies"])
