"""Checkpoints: CompressAI's form (`state_dict`), plus what is needed to rebuild the model and its quantizers.

A checkpoint is a dictionary of plain data and tensors, so that it loads with `weights_only=True`, here and in
CompressAI's own `eval_model`:

    state_dict    tensors, float32 (in the zoo parameters float16, loaded to float32, and CDF tables empty); the weights
                  of layers in 8 bits int8
    architecture, N, M, lmbda, and options where the model was built with some
    quantizers    {name: quantizer record as JSON}
    history       [{what was done: recipe, steps, cache fingerprint, parent ...}], oldest first
    boundary      tensors of the network for edges of blocks (boundary.py), float16, where there is one; of the zoo's
                  checkpoints they are in a file beside them
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lic_dist.errors import LicError, UsageError
from lic_dist.models import packs
from lic_dist.models.architectures import ModelSpec, adapt, build, family, installed
from lic_dist.models.compat import import_compressai
from lic_dist.models.gains import chosen_rate
from lic_dist.models.lambdas import LAMBDAS
from lic_dist.models.names import SUFFIX, split_gain, split_pack, with_gain, with_pack
from lic_dist.models.packs import Pack
from lic_dist.models.protocol import CodecModel
from lic_dist.models.recognise import as_named, parse_published_name, recognise, tensors_of
from lic_dist.models.unpickle import read

BOUNDARIES = "boundaries.pth"  # {name: boundary network} of the zoo
COMPRESSAI = "compressai:"  # begins the names of CompressAI's own zoo
CDF = ("._quantized_cdf", "._offset", "._cdf_length")  # CompressAI's tables, by the ends of their names
COMPUTED = (*CDF, ".scale_table", ".target")  # buffers that follow from the parameters


@dataclass
class Checkpoint:
    """A loaded model in float32 on the CPU, in eval mode, with updated integer tables, and what its file carries."""

    model: nn.Module
    spec: ModelSpec
    quantizers: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    source: str = ""
    boundary: dict[str, Tensor] = field(default_factory=dict)

    @property
    def codec(self) -> CodecModel:
        """The model as its family sees it."""
        return adapt(self.model)


def at_lambda(checkpoint: Checkpoint, lmbda: float) -> Checkpoint:
    """Return the same checkpoint, at another lambda."""
    return replace(checkpoint, spec=replace(checkpoint.spec, lmbda=lmbda))


class ModelSource(NamedTuple):
    """What a worker on any node loads: the arguments of `load`."""

    name_or_path: str
    architecture: str | None = None
    lmbda: float | None = None
    options: Mapping[str, Any] | None = None

    def load(self) -> Checkpoint:
        """Load it. Raises as `load`."""
        return load(*self)


def zoo() -> dict[str, Path]:
    """Return the checkpoints shipped in the package: name -> path."""
    folder = Path(str(resources.files("lic_dist"))) / "zoo"
    return {path.name.removesuffix(SUFFIX): path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def locate(name_or_path: str) -> Path:
    """Return the file of a zoo name or a path (a folder stands for its `checkpoint.pth.tar`), with or without a gain
    or packs.

    Raises:
        UsageError: neither.
    """
    base, pack = split_pack(name_or_path)
    if pack:
        return locate(base)
    name, _ = split_gain(name_or_path)
    if name.startswith(COMPRESSAI):
        return _fetch_compressai(name)
    path = _file(name)
    if path.is_file():
        return path
    if name in zoo():
        return zoo()[name]
    raise UsageError(f"no checkpoint '{name_or_path}'", hint=f"a path, or one of: {', '.join(zoo())}")


def _fetch_compressai(name: str) -> Path:
    """Return the file of `compressai:ARCHITECTURE/METRIC/QUALITY` in torch.hub's folder, downloaded if it is missing;
    variable-rate models have no quality.
    """
    from importlib import import_module
    from urllib.error import URLError

    import_compressai()
    urls = {**import_module("compressai.zoo.image").model_urls, **import_module("compressai.zoo.image_vbr").model_urls}
    architecture, metric, quality = (name.removeprefix(COMPRESSAI).split("/") + ["", ""])[:3]
    found = urls.get(architecture, {}).get(metric, {})
    at = found if isinstance(found, str) else found.get(int(quality) if quality.isdecimal() else 0)
    if at is None:
        raise UsageError(f"no model '{name}'", hint="such as compressai:mbt2018-mean/mse/4; mse or ms-ssim, 1 to 8")
    path = Path(torch.hub.get_dir()) / "checkpoints" / at.rsplit("/", 1)[1]
    if not path.is_file():
        try:
            torch.hub.load_state_dict_from_url(at, map_location="cpu", weights_only=True)
        except (URLError, OSError) as error:
            raise LicError(f"cannot fetch {at}: {error}", hint=f"put the file at {path}") from None
    return path


def exists(path: str) -> bool:
    """Return whether a path is a file, or a folder with a `checkpoint.pth.tar`."""
    return _file(path).is_file()


def _file(path: str) -> Path:
    return Path(path) / f"checkpoint{SUFFIX}" if Path(path).is_dir() else Path(path)


def absolute(name_or_path: str) -> str:
    """Return a path as an absolute one, which workers in other folders find; other names are returned unchanged."""
    base, pack = split_pack(name_or_path)
    if pack:
        return with_pack(absolute(base), str(Path(pack).resolve()))
    path, gain = split_gain(name_or_path)
    return with_gain(str(Path(path).resolve()), gain) if Path(path).exists() else name_or_path


def load(
    name_or_path: str,
    architecture: str | None = None,
    lmbda: float | None = None,
    options: Mapping[str, Any] | None = None,
    at_gain: bool = True,
) -> Checkpoint:
    """Load a checkpoint of lic_dist or a plain one of CompressAI's (give its lmbda, unless the file's name tells it).

    `NAME+FILE.pack` is that checkpoint with a pack merged into it: it carries the pack's quantizers alone.

    Of a variable-rate model, `FILE@GAIN` says the gain, which becomes one of its options, and lmbda is that of this
    rate; `at_gain` False loads it without.

    `options` are arguments of the model's class beyond N and M. What the file says counts, where it says something; of
    a file that says its architecture, its options. A class of a user's own (see architectures.py) is imported where
    `architecture` names it, never because a file does.

    Raises:
        UsageError: no such file, a class that is not named here, a gain that is missing or not one of the model's, or
            a lmbda that neither the file nor the caller gives.
        LicError: a file that is not a checkpoint, a family that is not served, a tensor that is not finite, or a pack
            of another model.
    """
    base, pack = split_pack(name_or_path)
    if pack:
        return replace(
            packed(load(base, architecture, lmbda, options, at_gain), packs.read(Path(pack))), source=name_or_path
        )
    path = locate(name_or_path)
    content = read(path)
    said = str(content.get("architecture") or "")
    if ":" in said and said not in (architecture, *installed().values()):
        raise UsageError(
            f"{path} is a model of {said}, which is not imported because a file names it",
            hint="if it is yours, name it too: model.architecture in a configuration, --architecture to a command",
        )
    architecture = said or architecture
    if architecture is not None:
        family(architecture)
    try:
        state = tensors_of(content)
        found, sizes = recognise(state, architecture)
    except LicError as error:
        raise LicError(f"{path}: {error.message}", hint=error.hint) from None
    architecture = architecture or found
    options = dict((content.get("options") if said else options) or {})
    rates, held = family(architecture).rates(state), options.get("gain")
    rate = chosen_rate(rates, held, split_gain(name_or_path)[1])
    if rate is not None:
        options["gain"] = rate.gain
        lmbda = (None if held is None else content.get("lmbda")) or lmbda or rate.lmbda
    elif rates and at_gain:
        raise UsageError(
            f"{path} is a model of {len(rates)} rates",
            hint=f"say which: {name_or_path}@0 to {name_or_path}@{len(rates) - 1}, or a gain, {name_or_path}@0.35",
        )
    else:
        lmbda = content.get("lmbda") or lmbda or _published_lmbda(path)
    if lmbda is None:
        values = ", ".join(f"{value:g}" for value in LAMBDAS["mse"])
        raise UsageError(
            f"{path} does not say its lmbda",
            hint="give model.lmbda or model.quality in a configuration, --lambda to a command; "
            f"CompressAI's qualities 1 to 8 have {values}",
        )
    if architecture != found:
        raise LicError(f"{path} does not fit {architecture}: it is {found}")
    model = build(architecture, **{**options, **sizes})
    try:
        model.load_state_dict(as_named(model.state_dict(), _without_tables(state)))
    except (RuntimeError, KeyError, ValueError) as error:
        raise LicError(f"{path} does not fit {architecture}: {str(error).splitlines()[-1].strip()}") from None
    update_tables(model)
    spec = ModelSpec(architecture, sizes["N"], sizes["M"], float(lmbda), options)
    return Checkpoint(
        model.eval(),
        spec,
        dict(content.get("quantizers", {})),
        list(content.get("history", [])),
        str(name_or_path),
        dict(content.get("boundary") or _shipped_boundary(path)),
    )


def _shipped_boundary(path: Path) -> dict[str, Tensor]:
    """Return the boundary network of a shipped checkpoint; empty where there is none, and for all others."""
    name = path.name.removesuffix(SUFFIX)
    if zoo().get(name) != path or not (shipped := path.with_name(BOUNDARIES)).is_file():
        return {}
    found: dict[str, Tensor] = read(shipped).get(name, {})
    return found


def packed(base: Checkpoint, pack: Pack) -> Checkpoint:
    """Return a checkpoint with a pack merged into it. Raises LicError for a pack of another model."""
    if (held := weights_digest(base.model)) != pack.base:
        raise LicError(
            f"this pack is of another model than {base.source}",
            hint=f"it is of '{pack.of}', weights {pack.base[:12]}; those of {base.source} are {held[:12]}",
        )
    model = copy.deepcopy(base.model)
    model.load_state_dict(pack.merged(model.state_dict()))
    update_tables(model)
    return replace(
        base,
        model=model,
        quantizers=dict(pack.quantizers),
        history=[*base.history, {**pack.entry, "pack": pack.digest}],
    )


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 of all tensors of a model but those that follow from others: what a pack is of, at any gain."""
    return digest({name: value for name, value in model.state_dict().items() if not name.endswith(COMPUTED)})


def _without_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state_dict whose CDF tables are empty, as they are before `update`."""
    return {name: value.new_empty(0) if name.endswith(CDF) else value for name, value in state.items()}


def _published_lmbda(path: Path) -> float | None:
    """Return the lmbda that a file name of CompressAI's tells. UsageError for MS-SSIM models, whose lambda weighs
    that.
    """
    told = parse_published_name(path.name)
    if told is None:
        return None
    architecture, metric, quality = told
    if metric == "mse":
        return LAMBDAS["mse"][quality - 1]
    theirs = LAMBDAS[metric][quality - 1]
    raise UsageError(
        f"{path} is {architecture} of quality {quality}, trained for MS-SSIM with lambda {theirs}",
        hint="give as model.lmbda, or --lambda, the weight of 255^2 MSE to search with",
    )


def check_agrees(spec: ModelSpec, **said: Any) -> None:
    """Refuse what a configuration or command says of a model where it differs from the checkpoint's spec.

    Raises:
        UsageError: they differ; both values are named.
    """
    for key, value in said.items():
        held = getattr(spec, key)
        if value is not None and value != {} and value != held:
            raise UsageError(
                f"{key} {value} is given, the checkpoint has {held}", hint=f"leave {key} out, it is in the file"
            )


def is_result_of(path: Path, identity: dict[str, Any]) -> bool:
    """Return whether the last history entry of an existing checkpoint has all fields of `identity`, a finished job's
    own.
    """
    if not path.is_file():
        return False
    last = (read(path).get("history") or [{}])[-1]
    return all(last.get(key) == value for key, value in identity.items())


def save(checkpoint: Checkpoint, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint whole or not at all; `dtype` float16 is for shipping.

    float16 halves the parameters and leaves CompressAI's CDF tables empty, as they are before its `update()`; `load`
    makes them again. Variable-rate models, whose tables are those of a gain, never have them in files. Other buffers
    keep their type, because CompressAI's bounds, such as 1e-9, would be zero in float16.
    """
    update_tables(checkpoint.model)
    state = {name: value.detach().cpu() for name, value in checkpoint.model.state_dict().items()}
    for name, _ in checkpoint.model.named_parameters():
        state[name] = state[name].to(dtype)
    if dtype is torch.float16 or checkpoint.codec.rates(state):
        state = _without_tables(state)
    write(
        {
            "state_dict": checkpoint.codec.packed(state),
            **checkpoint.spec.as_dict(),
            "quantizers": checkpoint.quantizers,
            "history": checkpoint.history,
            **({"boundary": checkpoint.boundary} if checkpoint.boundary else {}),
        },
        path,
    )


def write(content: dict[str, Any], path: Path) -> None:
    """Save atomically: write a temporary file in the same folder, sync it, and rename it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise LicError(f"cannot write {path}: {error}", hint="the checkpoint before it is kept") from None


def update_tables(model: nn.Module) -> None:
    """Rebuild the integer CDF tables of all entropy models from the present weights, for CompressAI's own coder."""
    with torch.no_grad():
        adapt(model).update()


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes of tensors, in the order of names."""
    import hashlib

    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()
