"""What ``fxq verify`` compares with the reference: the eager module, and ONNX Runtime."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import FxqError, UnknownNameError

from .options import Engine, Flavor

if TYPE_CHECKING:
    from fxq.artifact import Artifact

RUNTIMES = ("eager", "onnx")
EXACT = Engine.FBGEMM
"""The engine that equals the reference by contract, and stands in for it over many images."""
AGREEMENT = 0.999
"""The share of argmaxes in which ONNX Runtime must agree with the reference."""


@dataclass(frozen=True)
class Runtime:
    """Something that runs the program.

    Attributes:
        name: For people.
        module: The network, which can show its registers.
        exact: The kinds of layers that must introduce no difference.
        threshold: The share of argmaxes that must agree; None where any may.
        remark: Why it may differ, where it may.
    """

    name: str
    module: Any
    exact: frozenset[str] = frozenset()
    threshold: float | None = None
    remark: str = ""


def check_runtimes(names: list[str]) -> tuple[str, ...]:
    """The runtimes of ``--runtime``, each once.

    Raises:
        FxqError: There are none, or one is not known.

    Example:
        >>> check_runtimes(["onnx", "eager", "onnx"])
        ('onnx', 'eager')
    """
    for name in names:
        if name not in RUNTIMES:
            raise UnknownNameError("runtime", name, RUNTIMES)
    if not names:
        raise FxqError("--runtime names nothing", hint=f"for example {','.join(RUNTIMES)}")
    return tuple(dict.fromkeys(names))


def open_run(folder: Path, names: Iterable[str]) -> Artifact:
    """The run, once it is sure that what these runtimes need is there.

    Raises:
        ArtifactError: It is damaged.
        FxqError: ONNX Runtime is missing.
    """
    from fxq.artifact import load

    try:
        if "onnx" in names:
            importlib.import_module("onnx")
            importlib.import_module("onnxruntime")
        return load(folder)
    except ImportError as error:
        raise FxqError(
            f"ONNX Runtime cannot be imported: {error}",
            hint="pip install onnx onnxruntime, or leave it out: --runtime eager",
        ) from error


def runtime(
    name: str, artifact: Artifact, folder: Path, engine: Engine, flavor: Flavor | None
) -> Runtime:
    """The runtime of that name, for a run.

    Raises:
        FxqError: There is none on this machine, or it cannot express the program.
    """
    return _eager(artifact, engine) if name == "eager" else _onnx(artifact, folder, flavor)


def _eager(artifact: Artifact, engine: Engine) -> Runtime:
    from fxq.integer.differences import Kind

    name, module = f"eager {engine.value}", eager_module(artifact, engine)
    if engine is EXACT:
        return Runtime(name, module, exact=frozenset(Kind) - {Kind.FLOAT})
    return Runtime(
        name,
        module,
        remark=f"{engine.value} adds residuals inside convolutions and rounds ties "
        f"differently: compare with --engine {EXACT.value}",
    )


def own_engine(artifact: Artifact) -> str | None:
    """The engine a run was compiled for; None where its backend is another."""
    return artifact.module.engine if artifact.backend == "eager" else None  # type: ignore[return-value]


def eager_module(artifact: Artifact, engine: Engine) -> Any:
    """The eager module on an engine: the run's own, where that is its engine."""
    from fxq.registry import find_backend

    if own_engine(artifact) == engine:
        return artifact.module
    backend: Any = find_backend("eager")
    return backend.load(artifact.integers, engine=engine.value)


def _onnx(artifact: Artifact, folder: Path, wanted: Flavor | None) -> Runtime:
    from fxq.integer.differences import Kind

    module, source = _onnx_module(artifact, folder, wanted)
    flavor = str(module.flavor)
    name = f"onnx {flavor}, {source}"
    if flavor != Flavor.COMPACT:
        return Runtime(name, module, frozenset({Kind.CONV, Kind.LINEAR}), AGREEMENT)
    return Runtime(
        name,
        module,
        remark=f"in the {flavor} flavor ONNX Runtime computes layers in float, behind "
        "DequantizeLinear: results near a tie round differently",
    )


def _onnx_module(artifact: Artifact, folder: Path, flavor: Flavor | None) -> tuple[Any, str]:
    """The module, and which file it is: the deployed one, where the folder has it."""
    from fxq.registry import catalog, find_backend

    if "onnx" not in catalog("backends"):
        raise FxqError(
            "this fxq has no onnx backend", hint="upgrade fxq, or leave it out: --runtime eager"
        )
    backend: Any = find_backend("onnx")
    own = str(artifact.module.flavor) if artifact.backend == "onnx" else None
    if own is not None and flavor in (None, own):
        return artifact.module, backend.file_name(own)
    chosen = (flavor or Flavor.FAST).value
    if (folder / backend.file_name(chosen)).is_file():
        deployed = backend.load(artifact.integers, folder=folder, flavor=chosen)
        return deployed, backend.file_name(chosen)
    return backend.load(artifact.integers, flavor=chosen), "exported for this"
