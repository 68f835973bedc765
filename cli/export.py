"""``fxq export``: a saved run becomes a file for another runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import LoweringError

if TYPE_CHECKING:
    from fxq.artifact import Artifact


@dataclass(frozen=True)
class Job:
    """What ``fxq export`` was asked for; the fields are its options."""

    run: str
    backend: str = "onnx"
    flavor: str = "fast"
    opset: int | None = None
    static: bool = False
    output: Path | None = None
    force: bool = False


def run(job: Job) -> None:
    """The run is in a file of the backend, and what it holds is told."""
    from fxq.artifact import load

    from .trail import run_folder

    folder = run_folder(job.run)
    backend = _exporter(job.backend)
    artifact = load(folder)
    path = job.output or folder / backend.file_name(job.flavor)
    started = time.perf_counter()
    module = backend.export(artifact, path, force=job.force, flavor=job.flavor, **_options(job))
    _tell(artifact, module, path, time.perf_counter() - started, job)


def _exporter(name: str) -> Any:
    """The backend of that name, which can export.

    Raises:
        LoweringError: The backend exports nothing.
    """
    from fxq.registry import catalog, find_backend

    backend = find_backend(name)
    if not hasattr(backend, "export"):
        able = [one for one, other in catalog("backends").items() if hasattr(other, "export")]
        raise LoweringError(
            f"the {name} backend writes no files", hint=f"these do: {', '.join(sorted(able))}"
        )
    return backend


def _options(job: Job) -> dict[str, Any]:
    """The options that were given."""
    options: dict[str, Any] = {"dynamic": False} if job.static else {}
    if job.opset is not None:
        options["opset"] = job.opset
    return options


def _tell(artifact: Artifact, module: Any, path: Path, seconds: float, job: Job) -> None:
    from . import show
    from .compile import coverage_text

    data = path.with_name(f"{path.name}.data")
    size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    about = artifact.metadata.get("model")
    before = about.get("size") if isinstance(about, dict) else None
    ratio = f", {size / before:.3f} of the float weights" if before else ""
    rows = [
        ("flavor", _FLAVOR_TEXT.get(job.flavor, job.flavor)),
        (
            "graph",
            f"opset {module.opset}, {len(module.model.graph.node)} nodes, batch "
            + ("as captured" if job.static else "of any size"),
        ),
        ("size", f"{show.size_text(size)}{ratio}"),
        ("coverage", coverage_text(artifact.ledger)),
        ("time", f"{seconds:.1f} s"),
    ]
    show.facts(rows, f"exported to {path}", "green")
    show.lines(["", f"  fxq verify {job.run}"])


_FLAVOR_TEXT = {
    "packed": "packed: 4-bit weights packed, unpacked to int8 when ONNX Runtime loads the model",
    "fast": "fast: int8 weights and uint8 codes, which ONNX Runtime fuses to integer kernels",
    "compact": "compact: 4-bit weights and codes packed, computed in float behind DequantizeLinear",
}
