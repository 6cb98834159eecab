"""What a command loads before it does anything, and that it runs where folders cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lic_dist.quantization import jit
from tests.conftest import picture

PACKAGE = Path(jit.__file__).parents[1]


@pytest.fixture
def nowhere_to_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's own folders all refused, as in a read-only installation for a user without a home."""
    from numba.core import caching

    for locator in ("InTreeCacheLocator", "UserWideCacheLocator"):
        monkeypatch.setattr(getattr(caching, locator), "from_function", classmethod(lambda *_: None))


def double(x: np.ndarray) -> np.ndarray:
    return x + x


@pytest.mark.slow
def test_a_read_only_installation_caches_kernels_among_the_temporary_files(
    nowhere_to_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compiled = jit.kernel(double)
    assert compiled(np.arange(3)).tolist() == [0, 2, 4]
    folder = tmp_path / f"lic-dist-numba-{os.getuid()}"
    assert list(folder.rglob("*.nbc"))
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trap", ["open to others", "a link", "a file"])
def test_a_cache_folder_that_others_could_fill_is_not_used(
    nowhere_to_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"lic-dist-numba-{os.getuid()}"
    if trap == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    elif trap == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.touch()
    assert jit.kernel(double)(np.arange(3)).tolist() == [0, 2, 4]
    assert not list(tmp_path.rglob("*.nbc"))


PROBE = """
import sys
from lic_dist.app.cli import app
for line in sys.stdin.read().splitlines():
    try:
        app(line.split())
    except SystemExit as stop:
        assert not stop.code, line
    print("ran", line.split(" --")[0], file=sys.stderr)
"""
EXPERIMENT = """
name: nobody
train: {N: 8, M: 12, lmbda: 0.05, steps: 20, batch: 4, crop: 64, lr: 0.002, warmup: 1, out: base}
model: {checkpoint: base}
images: {path: photos, crop: 64, variations: 4, held_out: valid, tolerate: 1}
quantizer: {name: rdoq, step: 0.7, lambda_scale: 0.1, shift: auto, group: rdoq, pilot: 8, calibration: 4}
cache: {path: x.zarr, shard: 8, batch: 4}
engine: {name: local}
finetune: {recipe: all-but-encoder, steps: 4, batch: 4, warmup: 1, evaluate_every: 2, lr: 1.0e-5, streams: 2,
           out: finetuned}
evaluate:
  images: photos/valid
  checkpoints: {base: [sq], finetuned: [sq, rdoq]}
  show: [图片.png, a_$b^c$.png]
  out: e.json
report: {out: report}
"""
LINES = """
models
models describe base-small
data kodak
config explain quantizer.states
train e.yaml
init mine --images photos --checkpoint base-small
cache scan e.yaml
cache plan e.yaml
cache adapt e.yaml
cache build e.yaml
cache requantize e.yaml --set quantizer.name=deadzone --set quantizer.rounding=0.4 --set quantizer.group=deadzone
cache inspect e.yaml --plot plot.png
cache faults e.yaml
cache verify e.yaml
finetune e.yaml
evaluate e.yaml
evaluate e.yaml --generations 2 --set evaluate.out=generations.json
report e.json --out other
run e.yaml
encode photos/valid/a_$b^c$.png a.lic --model finetuned
decode a.lic a.png --model finetuned
encode photos/valid/a_$b^c$.png b.lic --model finetuned --quantizer sq --deterministic
decode b.lic b.png --model finetuned
export base half.pth.tar --half
bench codec --model finetuned --images photos --quick --rounds 1
"""


def odd_photos(folder: Path) -> None:
    """Photos of which libraries have something to say: their metadata, their palettes, their names."""
    for part in ("train", "valid"):
        (folder / part).mkdir(parents=True)
    pictures = [Image.fromarray(picture(seed, 140, 200)) for seed in range(4)]
    transparency = bytes([0, 128] + [255] * 254)
    pictures[0].convert("P").save(folder / "train" / "palette.png", transparency=transparency)
    exif = Image.Exif()
    exif[0x010E] = "described at length " * 5
    pictures[1].save(folder / "train" / "exif.jpg", exif=exif.tobytes()[:60])
    pictures[2].save(folder / "train" / "图片.png")
    pictures[3].save(folder / "valid" / "图片.png")
    pictures[3].save(folder / "valid" / "a_$b^c$.png")
    Image.fromarray(np.full((140, 200, 3), 128, np.uint8)).save(folder / "valid" / "flat.png")


def keep_kernels(scratch: Path) -> None:
    """Put what numba has compiled for this checkout where `nobody` would find it again: he has run before."""
    from numba.core.caching import _CacheLocator

    owner = scratch.stat()
    folder = scratch / f"lic-dist-numba-{owner.st_uid}"
    folder.mkdir(mode=0o700)
    for source in PACKAGE.rglob("*.py"):
        copy = scratch.parent / "lic_dist" / source.relative_to(PACKAGE)
        place = folder / _CacheLocator.get_suitable_cache_subpath(str(copy))
        for kept in (source.parent / "__pycache__").glob(f"{source.stem}.*.nb?"):
            place.mkdir(exist_ok=True)
            shutil.copy(kept, place)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid)


@pytest.fixture
def nobody() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs code as a user without a home, on an installation that he cannot write to: only TMPDIR, where he is.

    Whoever is not root stays himself.
    """
    nobody = 65534 if os.getuid() == 0 and shutil.which("setpriv") else os.getuid()
    become = ["setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups"] if nobody != os.getuid() else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        installed = shutil.copytree(PACKAGE, folder / "lic_dist", ignore=shutil.ignore_patterns("__pycache__"))
        scratch = folder / "tmp"
        scratch.mkdir()
        if become:
            shutil.chown(scratch, nobody, nobody)
        before = sorted(installed.rglob("*"))

        def run(code: str, said: str = "") -> subprocess.CompletedProcess[str]:
            done = subprocess.run(
                [*become, sys.executable, "-c", code],
                env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": name, "TMPDIR": str(scratch),
                     "PYTHONWARNINGS": "default"},
                input=said,
                capture_output=True,
                text=True,
                cwd=scratch,
                timeout=280,
            )  # fmt: skip
            assert not become or sorted(installed.rglob("*")) == before
            return done

        run.scratch = scratch  # type: ignore[attr-defined]
        yield run


@pytest.mark.slow
def test_kernels_run_for_a_user_without_a_home_on_an_installation_he_cannot_write_to(nobody: Any) -> None:
    code = """
import numpy as np
from lic_dist.quantization.kernels import largest_magnitude
print(largest_magnitude(np.float32([-3, 2])))
"""
    done = nobody(code)
    assert done.stdout.strip() == "3.0", done.stderr
    assert list(nobody.scratch.rglob("*.nbc"))


@pytest.mark.slow
def test_every_command_runs_for_a_user_without_a_home_and_shows_no_librarys_warning(nobody: Any) -> None:
    odd_photos(nobody.scratch / "photos")
    keep_kernels(nobody.scratch)
    (nobody.scratch / "e.yaml").write_text(EXPERIMENT, encoding="utf-8")
    done = nobody(PROBE, LINES.strip())
    said = done.stderr.splitlines()
    ran = [line for line in said if line.startswith("ran ")]
    assert done.returncode == 0 and len(ran) == len(LINES.split("\n")) - 2, (done.stdout[-500:], done.stderr[-3000:])
    words = ("Warning", "findfont", "atplotlib", "nonexistent")
    told = [line for line in said if any(word in line for word in words)]
    assert not told, told
    assert (nobody.scratch / "report" / "report.html").is_file() and (nobody.scratch / "b.png").is_file()


@pytest.mark.slow
def test_a_ray_of_our_own_starts_where_there_is_no_home(tmp_path: Path) -> None:
    code = """
from lic_dist.engine.ray_cluster import connected, ray
with connected(None, 1): print(ray.is_initialized())
print(ray.is_initialized())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HOME": os.devnull},  # not even root makes a folder there
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
    )
    assert done.stdout.split() == ["True", "False"], done.stderr  # and it ends


LIGHT = """
import pickle, sys
from lic_dist.models.compat import import_compressai
found = import_compressai()
model = found.models.MeanScaleHyperprior(N=8, M=8)
unwanted = {"torchvision", "torch_geometric", "compressai.datasets", "matplotlib", "altair", "pandas", "scipy.stats"}
assert not unwanted & set(sys.modules)
import scipy.stats
quantile = found.entropy_models.GaussianConditional._standardized_quantile
assert [quantile(one) for one in (5e-10, 5e-5, 0.1, 0.5)] == scipy.stats.norm.ppf([5e-10, 5e-5, 0.1, 0.5]).tolist()
import compressai, compressai.zoo
assert compressai is found and compressai.zoo.image.MeanScaleHyperprior is type(pickle.loads(pickle.dumps(model)))
assert compressai.datasets.ImageFolder and compressai.registry.TRANSFORMS and compressai.__version__
names = {}
exec("from compressai.models import *", names)
assert names["PointNetReconstructionPccModel"] and names["MeanScaleHyperprior"] is type(model)
"""
WHOLE = """
from lic_dist.models.compat import import_compressai, import_torchvision
import_torchvision()
import compressai
before = compressai.models.MeanScaleHyperprior
assert import_compressai() is compressai and compressai.models.MeanScaleHyperprior is before
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [LIGHT, WHOLE], ids=["lightly first", "whole first"])
def test_compressai_is_imported_lightly_and_is_whole_for_whoever_asks(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


HEAVY = {"torch", "numba", "compressai", "ray", "altair", "pandas", "zarr", "pyarrow", "scipy.stats", "torchvision"}


def heavy_modules(*command: str) -> set[str]:
    """What of HEAVY a command loads."""
    code = "\n".join(
        (
            "import atexit, sys",
            f"atexit.register(lambda: print('loaded', *({HEAVY!r} & set(sys.modules)), file=sys.stderr))",
            f"from lic_dist.app.cli import main_of; main_of(*{command!r})",
        )
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split()[1:])


def test_importing_the_package_loads_nothing() -> None:
    code = f"import sys, lic_dist; assert not ({HEAVY!r} | {{'numpy', 'typer', 'rich'}}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_a_worker_that_reads_photos_loads_neither_torch_nor_numba() -> None:
    code = "import sys, lic_dist.building.reading; assert not {'torch', 'numba', 'compressai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "needed"),
    [
        (("--help",), set()),
        (("config", "explain", "quantizer.states"), set()),
        (("models",), {"torch"}),
    ],
    ids=" ".join,
)
def test_a_command_loads_what_it_needs(command: tuple[str, ...], needed: set[str]) -> None:
    assert heavy_modules(*command) <= needed


@pytest.mark.slow
def test_inspect_loads_neither_torch_nor_altair(built: Path) -> None:
    assert heavy_modules("cache", "inspect", str(built)) <= {"zarr", "pyarrow"}


@pytest.mark.slow
def test_encode_and_decode_load_torch_and_the_search_alone(base: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (9, 99, 200)).save(tmp_path / "a.png")
    files = [str(tmp_path / name) for name in ("a.png", "a.bin", "b.png")]
    for command in (("encode", *files[:2]), ("decode", *files[1:])):
        assert heavy_modules(*command, "--model", str(base)) <= {"torch", "numba", "compressai"}
