"""What is handed to clusters: each file against its schema or its structure, the Slurm script in a dry run."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lic_dist import __version__, config
from lic_dist.models import checkpoint
from tests import browser
from tests.printed import parse_command

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "jobs"
IMAGE = f"REGISTRY/lic-dist:{__version__}"


def shown_commands(text: str) -> list[list[str]]:
    """The `lic-dist ...` lines of a text, comment signs taken off and continued lines joined."""
    plain = re.sub(r"^# ?", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"^\s*(lic-dist .*)$", plain, re.MULTILINE)]


def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (JOBS / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_cluster_file_is_valid_for_rays_launcher() -> None:
    from ray.autoscaler._private import util

    document = yaml.safe_load((JOBS / "ray-cluster.yaml").read_text())
    whole = util.prepare_config(document)
    util.validate_config(whole)
    assert whole["docker"]["image"] == IMAGE and whole["setup_commands"] == whole["head_setup_commands"] == []
    worker = whole["available_node_types"]["gpu"]
    assert worker["min_workers"] == worker["max_workers"] == whole["max_workers"]
    with pytest.raises(Exception, match="hed_node_type"):
        util.validate_config({**whole, "hed_node_type": "head"})


def test_the_kuberay_job_runs_a_command_of_ours_over_its_own_experiment(tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all((JOBS / "kuberay-rayjob.yaml").read_text()))
    maps = {one["metadata"]["name"]: one["data"] for one in documents if one["kind"] == "ConfigMap"}
    (job,) = (one for one in documents if one["kind"] == "RayJob")
    assert job["apiVersion"] == "ray.io/v1"
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == IMAGE and re.fullmatch("ray-(head|worker)", container["name"])
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    python, m, module, *words = shlex.split(spec["entrypoint"])
    assert (python, m, module, parse_command(words)) == ("python", "-m", "lic_dist", "cache build")
    head = groups[0]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in head["volumes"]}
    file = Path(words[-1])
    text = maps[volumes[mounts[str(file.parent)]]["configMap"]["name"]][file.name]
    (tmp_path / file.name).write_text(text)
    experiment = config.load(tmp_path / file.name)
    assert experiment.images and experiment.cache and experiment.engine.address == "auto"
    shared = Path(next(path for path, name in mounts.items() if name == "shared"))
    assert shared in experiment.images.path.parents and shared in Path(experiment.cache.path).parents
    gpus = sum(
        group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for group in groups[1:]
    )
    assert experiment.engine.encoders * experiment.engine.gpus_per_encoder <= gpus


def test_the_image_installs_the_package_from_what_its_context_lets_in() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    steps = dockerfile()
    sources = [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]
    allowed = {line[1:] for line in (JOBS / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert set(sources) == allowed and all((ROOT / source).exists() for source in sources)
    assert {project["readme"], *project["license-files"], "pyproject.toml", "lic_dist"} == set(sources)
    (install,) = (rest for name, rest in steps if name == "RUN" and "pip install" in rest)
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', install)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    asked = next(one for one in project["dependencies"] if one.startswith("ray["))
    assert asked.split(">=")[0] in install
    (version,) = (rest.split("=")[1] for name, rest in steps if name == "ARG")
    job = list(yaml.safe_load_all((JOBS / "kuberay-rayjob.yaml").read_text()))[-1]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == version
    assert f"-t {IMAGE} ." in (JOBS / "Dockerfile").read_text()


def test_the_commands_that_the_cluster_file_shows_parse() -> None:
    commands = [parse_command(words) for words in shown_commands((JOBS / "ray-cluster.yaml").read_text())]
    assert "submit cache" in commands


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_slurm_script_pleases_shellcheck() -> None:
    subprocess.run(["shellcheck", JOBS / "slurm.sbatch"], check=True)


STUBS = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; printf "%s\\n" one two three',
    # options fall away, the command runs here; a Ray "node" lives until it is told to end
    "srun": 'echo "srun $*" >> "$CALLS"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "ray": 'trap \'echo "ended $*" >> "$CALLS"; exit 143\' TERM; touch "$CALLS.${2#--}"; while :; do sleep 0.05; done',
    # waiting for nodes, and the build, whose exit code the test chooses
    "python": """[[ $1 == - ]] || echo "python $*" >> "$CALLS"
        until [[ -e $CALLS.head && ( ${3:-0} == 1 || -e $CALLS.block ) ]]; do sleep 0.05; done
        [[ $1 == - ]] || exit "$BUILD\"""",
    "torchrun": 'echo "torchrun $*" >> "$CALLS"',
}


@pytest.mark.parametrize("build", [0, 3])
def test_the_slurm_script_in_a_dry_run(build: int, tmp_path: Path) -> None:
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY"))}
    environment |= {
        "PATH": f"{tmp_path}:{environment['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "BUILD": str(build),
        "SLURM_JOB_ID": "70123",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "[one-three]",
        "SLURM_CPUS_PER_TASK": "32",
        "SLURM_GPUS_ON_NODE": "4",
    }
    subprocess.run(["bash", "-n", JOBS / "slurm.sbatch"], check=True)
    words = ["a b.yaml", "--set", "finetune.steps=9"]
    done = subprocess.run(["bash", JOBS / "slurm.sbatch", *words], env=environment, timeout=60, check=False)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == build
    assert calls[0] == "scontrol show hostnames [one-three]"
    head, workers = (next(one for one in calls if start in one) for start in ("ray start --head", "ray start --block"))
    assert "--nodelist=one" in head and "--port=20123 --num-cpus=32 --num-gpus=4" in head
    assert "--nodes=2 --ntasks=2 --exclude=one" in workers and "--address=one:20123" in workers
    command = next(one for one in calls if one.startswith("python"))
    assert (
        command
        == f"python -m lic_dist cache build {' '.join(words)} --set engine.name=ray --set engine.address=one:20123"
    )
    parse_command([*command.split()[3:5], *words, "--set", "engine.name=ray"])
    ends = [position for position, one in enumerate(calls) if one.startswith("ended start")]
    assert len(ends) == 2 and min(ends) > calls.index(command)
    training = [one for one in calls if one.startswith("torchrun")]
    assert len(training) == (build == 0)
    if training:
        assert calls.index(training[0]) > max(ends)
        assert "--nnodes=3 --nproc-per-node=4" in training[0] and training[0].endswith(
            f"lic_dist finetune {' '.join(words)}"
        )
    usage = subprocess.run(
        ["bash", JOBS / "slurm.sbatch"], env=environment, capture_output=True, text=True, check=False
    )
    assert usage.returncode != 0 and "usage: sbatch" in usage.stderr


@pytest.mark.slow
def test_photos_are_dealt_into_parts_by_their_bytes(photos: Path, tmp_path: Path) -> None:
    def deal(source: Path, *parts: str) -> dict[str, bytes]:
        out = tmp_path / "-".join(parts)
        command = [sys.executable, JOBS / "split_photos.py", source, out, *parts]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")}

    renamed = tmp_path / "renamed"
    for number, path in enumerate(sorted((photos / "train").glob("*.png"))):
        (renamed / "kind").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, renamed / "kind" / f"{number}.png")
    dealt, again = deal(photos / "train", "a=0.5", "b=0.5"), deal(renamed, "a=0.5", "b=0.25", "c=0.25")
    assert len(dealt) == len(again) == len(list((photos / "train").glob("*.png")))
    assert {name.split("/")[1] for name in again} == {"kind"}

    def of(part: str, found: dict[str, bytes]) -> set[bytes]:
        return {content for name, content in found.items() if name.split("/")[0] == part}

    assert of("a", dealt) == of("a", again) and of("b", dealt) == of("b", again) | of("c", again)
    for content in of("a", dealt):
        assert hashlib.sha256(content).digest()[0] < 128


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="there is no Chromium")
@pytest.mark.parametrize("domain", ["screens", pytest.param("frames", marks=pytest.mark.nightly)])
def test_pictures_of_a_domain_are_drawn(domain: str, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    for number in range(4):
        lines = "".join(f"<p>{f'Line {line} of page {number}, black on white. ' * 9}</p>" for line in range(60))
        (tmp_path / f"site/{number}.html").write_text(f"<html><body>{lines}</body></html>")
    command = [sys.executable, JOBS / "domain_pictures.py", domain, tmp_path, "--pages", tmp_path / "site"]
    subprocess.run([*command, "--part", "test", "--pictures", "2"], check=True)
    files = sorted((tmp_path / f"{domain}-test").iterdir())
    assert [one.name for one in files] == [f"{domain}-00.png", f"{domain}-01.png"]
    one, other = (np.asarray(Image.open(file)) for file in files)
    assert one.shape == (512, 512, 3) and one.std() > 10 and not np.array_equal(one, other)
    assert domain == "screens" or len(np.unique(one.reshape(-1, 3), axis=0)) > 1000  # no error in its place


SMALL = ("steps=2", "batch=2", "crop=64", "precision=float32")


TRAINED = """echo "$*" >> "$CALLS"
case $1 in
    train) for word; do [[ $word != train.out=* ]] || out=${word#train.out=}; done
        mkdir -p "$out" && echo "{}" > "$out/log.jsonl" ;;
    export) echo new > "$3" ;;
esac"""


@pytest.mark.slow
def test_the_zoo_goes_on_where_it_was_left(photos: Path, tmp_path: Path) -> None:
    """On this CPU, two steps of one lambda, as the time is up after it; the next call begins with the other one."""
    subprocess.run([sys.executable, JOBS / "pack_photos.py", photos / "train", tmp_path / "packed"], check=True)
    assert len(list((tmp_path / "packed").glob("*.png.avif"))) == 6
    settings = [f"train.{one}" for one in SMALL] + ["images.held_out=0.3"]
    small = [word for one in settings for word in ("--set", one)]
    environment = {**os.environ, "LAMBDAS": "0.0018 0.013", "PYTHONPATH": str(ROOT), "CALLS": str(tmp_path / "calls")}

    def run(seconds: int, programs: Path) -> list[str]:
        command = ["bash", JOBS / "zoo-gpu.sh", tmp_path / "packed", tmp_path / "out", str(seconds), *small]
        path = {"PATH": f"{programs}:{os.environ['PATH']}"}
        done = subprocess.run(command, env=environment | path, capture_output=True, text=True, check=True)
        return re.findall(r"lambda (\S+) (took|is left)", done.stdout)

    assert run(0, Path(sys.executable).parent) == [("0.0018", "took"), ("0.013", "is left")]
    found = checkpoint.read(tmp_path / "out/base-0.0018.pth.tar")
    assert found["lmbda"] == 0.0018 and [entry["lmbda"] for entry in found["history"]] == [0.0035, 0.0018, 0.0018]
    (tmp_path / "lic-dist").write_text(f"#!/usr/bin/env bash\n{TRAINED}\n")
    (tmp_path / "lic-dist").chmod(0o755)
    assert run(600, tmp_path) == [("0.013", "took"), ("0.0018", "took")]
    first, _, second, _ = (tmp_path / "calls").read_text().splitlines()
    assert "train.start=base-0.013 " in first and f"train.start={tmp_path}/out/base-0.0018.pth.tar " in second
    assert not list((tmp_path / "out").glob("run-*"))
