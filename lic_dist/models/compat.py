"""Import compressai and piq without their slow imports, and torchvision beside a CPU build of torch."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_keep_alive: list[object] = []  # a torch.library.Library undoes its definitions when it is collected

_TORCHVISION_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_DEFERRED: dict[
    str, Container[str] | None
] = {  # submodules whose import by a package's __init__ is deferred; None: all
    "compressai": None,
    "compressai.registry": ("transforms",),  # torchvision, torch_geometric
    "compressai.models": ("pointcloud",),  # torch_geometric
}

_PIQ_NETWORKS = ("msid", "fid", "kid", "pr", "gs", "isc", "brisque", "perceptual", "pieapp", "clip_iqa")


def import_compressai() -> ModuleType:
    """Import and return `compressai` with its submodules `ans`, `models` and `entropy_models`.

    compressai's own `__init__` imports everything, including torchvision, torch_geometric and point-cloud code, which
    takes longer than torch. Here it runs without those imports. What they would have brought is imported when it is
    first used, so that other code in this process finds all of the package, and the same classes. If compressai has
    been imported already it is left as it is.
    """
    if "compressai" not in sys.modules:
        if find_spec("compressai") is None:
            raise ModuleNotFoundError("No module named 'compressai'", name="compressai")
        with _stubbed("scipy.stats"):  # slower than all other imports, and used for one quantile only
            for name, deferred in _DEFERRED.items():
                _import_without(name, deferred)
        from compressai.entropy_models import GaussianConditional

        GaussianConditional._standardized_quantile = staticmethod(standardized_quantile)
        GaussianConditional.update = _once_for_each_table_of_scales(GaussianConditional.update)
    for name in ("ans", "entropy_models", "models"):
        importlib.import_module(f"compressai.{name}")
    return sys.modules["compressai"]


def import_piq() -> ModuleType:
    """Import and return `piq`; what it has of networks, and torchvision with it, is imported when it is first used."""
    if "piq" not in sys.modules:
        _import_without("piq", _PIQ_NETWORKS)
    return sys.modules["piq"]


def standardized_quantile(probability: float) -> float:
    """Return `scipy.stats.norm.ppf`, computed by torch's float64 `ndtri`, which has the same source (Cephes)."""
    import torch

    return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))


def _once_for_each_table_of_scales(update: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return `GaussianConditional.update` that makes the integer tables of equal scales once in a process.

    No weights are in them, and to make them takes longer than all else that loading a small model takes.
    """
    made: dict[tuple[object, ...], tuple[Any, ...]] = {}
    names = ("_quantized_cdf", "_offset", "_cdf_length")

    @wraps(update)
    def updated(layer: Any) -> None:
        scales = layer.scale_table
        precision = (layer.tail_mass, layer.entropy_coder_precision)
        of = (type(layer), *precision, scales.device, scales.cpu().numpy().tobytes())
        if of not in made:
            update(layer)
            made[of] = tuple(getattr(layer, name).clone() for name in names)
        for name, table in zip(names, made[of], strict=True):
            setattr(layer, name, table.clone())

    return updated


def import_torchvision() -> None:
    """Import torchvision, also beside a CPU build of torch.

    PyPI's torchvision is linked against CUDA. Beside a CPU torch its compiled part is missing, and the import fails
    with "operator torchvision::nms does not exist". In that case the two operators are declared, but not defined,
    because nothing here calls them.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _declare_torchvision_operators()
        importlib.import_module("torchvision")


@contextmanager
def _stubbed(name: str) -> Iterator[None]:
    """Put an empty module in place of `name` within the block, so that importing it is quick."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]


def _import_without(name: str, deferred: Container[str] | None) -> None:
    """Import a package whose `__init__` leaves out the imports of the submodules `deferred`, until they are needed."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)
    module = module_from_spec(spec)
    tree = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    names, stars = _remove_imports(tree, name, deferred)
    _defer_names(module, spec, names, stars)
    sys.modules[name] = module
    try:
        exec(compile(tree, spec.origin, "exec"), module.__dict__)
    except BaseException:  # raised again: no half of a module stays
        del sys.modules[name]
        raise
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _remove_imports(
    tree: ast.Module, package: str, deferred: Container[str] | None
) -> tuple[dict[str, str], list[str]]:
    """Remove imports of submodules from an `__init__`; return {name: its submodule}, and the submodules of `import
    *`.
    """
    names, stars, kept = dict[str, str](), list[str](), list[ast.stmt]()
    for statement in tree.body:
        if not isinstance(statement, ast.ImportFrom):
            kept.append(statement)
        elif statement.level == 0 and statement.module == package and deferred is None:
            names.update((alias.name, "") for alias in statement.names)
        elif statement.level == 1 and statement.module and deferred is not None and statement.module in deferred:
            if statement.names[0].name == "*":
                stars.append(statement.module)
            else:
                names.update((alias.asname or alias.name, statement.module) for alias in statement.names)
        else:
            kept.append(statement)
    tree.body = kept
    return names, stars


def _defer_names(module: ModuleType, spec: ModuleSpec, names: dict[str, str], stars: list[str]) -> None:
    """Give a module the `__getattr__` and `__dir__` (PEP 562) that import the names removed from it."""

    def import_all() -> None:
        for submodule in stars:
            whole = importlib.import_module(f"{spec.name}.{submodule}")
            public = getattr(whole, "__all__", None) or [one for one in vars(whole) if not one.startswith("_")]
            for one in public:
                module.__dict__.setdefault(one, getattr(whole, one))
        for one in names:
            getattr(module, one)

    def deferred_attribute(name: str) -> Any:
        if name in names:
            import_torchvision()
            found = importlib.import_module(f"{spec.name}.{names[name] or name}")
            value = getattr(found, name) if names[name] else found
            return module.__dict__.setdefault(name, value)
        if stars and (name == "__all__" or not name.startswith("__")):  # `import *` asks for __all__ first
            import_torchvision()
            import_all()
            if name in module.__dict__:
                return module.__dict__[name]
        raise AttributeError(f"module '{spec.name}' has no attribute '{name}'", name=name, obj=module)

    module.__dict__["__getattr__"] = deferred_attribute
    module.__dict__["__dir__"] = lambda: sorted({*module.__dict__, *names})


def _declare_torchvision_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_OPERATORS:
        library.define(schema)
    _keep_alive.append(library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
