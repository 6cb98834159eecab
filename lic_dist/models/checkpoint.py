"""Checkpoints: CompressAI's form (`state_dict`), plus what is needed to rebuild the model and its quantizers.

A checkpoint is a dictionary of plain data and tensors, so that it loads with `weights_only=True`, here and in
CompressAI's own `eval_model`:

    state_dict    tensors, float32 (in the zoo parameters float16, loaded to float32, and CDF tables empty)
    architecture, N, M, lmbda
    quantizers    {name: quantizer record as JSON}
    history       [{what was done: recipe, steps, cache fingerprint, parent ...}], oldest first
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist.errors import LicError, UsageError
from lic_dist.models.architectures import ModelSpec, build, sizes_of
from lic_dist.models.compat import import_compressai

SUFFIX = ".pth.tar"
CDF = ("._quantized_cdf", "._offset", "._cdf_length")  # CompressAI's tables, by the ends of their names


@dataclass
class Checkpoint:
    """A loaded model in float32 on the CPU, in eval mode, its integer tables updated; and what it carries."""

    model: nn.Module
    spec: ModelSpec
    quantizers: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    source: str = ""


def zoo() -> dict[str, Path]:
    """The checkpoints shipped in the package: name -> path."""
    folder = Path(str(resources.files("lic_dist"))) / "zoo"
    return {path.name.removesuffix(SUFFIX): path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def locate(name_or_path: str) -> Path:
    """The file of a zoo name or a path (a folder stands for its `checkpoint.pth.tar`).

    Raises:
        UsageError: neither.
    """
    path = _file(name_or_path)
    if path.is_file():
        return path
    if name_or_path in zoo():
        return zoo()[name_or_path]
    raise UsageError(f"no checkpoint '{name_or_path}'", hint=f"a path, or one of: {', '.join(zoo())}")


def is_there(path: str) -> bool:
    """Whether a path is a file, or a folder with a `checkpoint.pth.tar`."""
    return _file(path).is_file()


def _file(path: str) -> Path:
    return Path(path) / f"checkpoint{SUFFIX}" if Path(path).is_dir() else Path(path)


def absolute(name_or_path: str) -> str:
    """A path that workers in other folders find too; other names stay names."""
    return str(Path(name_or_path).resolve()) if Path(name_or_path).exists() else name_or_path


def load(
    name_or_path: str,
    architecture: str | None = None,
    lmbda: float | None = None,
) -> Checkpoint:
    """Load a checkpoint of ours, or a plain one of CompressAI's (then give architecture and lmbda).

    Raises:
        UsageError: no such file, or an architecture or lmbda that neither the file nor the caller gives.
        LicError: a file that is not a checkpoint, or whose tensors do not fit the architecture.
    """
    path = locate(name_or_path)
    content = read(path)
    state = next((content[key] for key in ("state_dict", "network", "model_state_dict") if key in content), content)
    architecture = content.get("architecture") or architecture
    lmbda = content.get("lmbda") or lmbda
    if architecture is None or lmbda is None:
        missing = "architecture" if architecture is None else "lmbda"
        raise UsageError(f"{path} does not say its {missing}", hint=f"set model.{missing}")
    if not {"g_a.0.weight", "h_a.0.deviation"} & set(state):
        raise LicError(f"{path} holds no image codec", hint="a CompressAI state_dict has tensors such as g_a.0.weight")
    N, M = sizes_of(state)
    model = build(architecture, N, M)
    floats = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    try:
        model.load_state_dict(floats)
    except (RuntimeError, KeyError, ValueError) as error:
        raise LicError(f"{path} does not fit {architecture}: {str(error).splitlines()[-1].strip()}") from None
    update_tables(model)
    spec = ModelSpec(architecture, N, M, float(lmbda))
    return Checkpoint(
        model.eval(), spec, dict(content.get("quantizers", {})), list(content.get("history", [])), str(name_or_path)
    )


def read(path: Path) -> dict[str, Any]:
    """The raw content of a checkpoint file, on the CPU, loaded with `weights_only=True`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise LicError(f"{path} is not a checkpoint: {reason}") from None
    if not isinstance(content, dict):
        raise LicError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def is_made(path: Path, identity: dict[str, Any]) -> bool:
    """Whether a checkpoint is there whose last entry of history has all of these fields: a finished job's own."""
    if not path.is_file():
        return False
    last = (read(path).get("history") or [{}])[-1]
    return all(last.get(key) == value for key, value in identity.items())


def save(checkpoint: Checkpoint, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint whole or not at all; `dtype` float16 is for shipping.

    It halves the parameters, and leaves CompressAI's CDF tables empty, as they are before its `update()`: `load` makes
    them anew. Other buffers stay as they are: CompressAI's bounds, 1e-9 among them, are nothing in float16.
    """
    update_tables(checkpoint.model)
    state = {name: value.detach().cpu() for name, value in checkpoint.model.state_dict().items()}
    for name, _ in checkpoint.model.named_parameters():
        state[name] = state[name].to(dtype)
    if dtype is torch.float16:
        state |= {name: value.new_empty(0) for name, value in state.items() if name.endswith(CDF)}
    write(
        {
            "state_dict": state,
            **checkpoint.spec.as_dict(),
            "quantizers": checkpoint.quantizers,
            "history": checkpoint.history,
        },
        path,
    )


def write(content: dict[str, Any], path: Path) -> None:
    """Save atomically: a temporary file beside, synced, then renamed."""
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
    """Rebuild the integer CDF tables of both entropy models from the present weights, for CompressAI's own coder."""
    import_compressai()
    with torch.no_grad():
        model.update(force=True)  # type: ignore[operator]


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors, in the order of names."""
    import hashlib

    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()
