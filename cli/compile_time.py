"""What a compilation costs: wall time and peak memory, each one in a fresh process.

Time is that of the compilation alone; imports, the network and the images are there before. Peak
memory is that of the whole process, beside what it held before the compilation began.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fxq.errors import FxqError

from .bench import TORCH_AO, Request, calibration_batches
from .options import Engine


@dataclass(frozen=True)
class Cost:
    """What one kind of compilation cost.

    Attributes:
        name: A recipe, or ``torch.ao``.
        each: Seconds, run by run.
        peak: Largest memory of the process in bytes, the median over the runs.
        before: The memory it held before, likewise.
    """

    name: str
    each: tuple[float, ...]
    peak: int
    before: int

    @property
    def seconds(self) -> float:
        """The median over the runs."""
        return statistics.median(self.each)


def run(request: Request) -> None:
    """The recipes and torch.ao compile the same network on the same images, and are compared."""
    from . import show, show_bench
    from .trail import is_run

    if is_run(request.name):
        raise FxqError(
            "--compile-time needs a network, not a run", hint="name the network and --recipe"
        )
    names = [*request.recipes, *([TORCH_AO] if TORCH_AO in request.against else [])]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for position in range(request.rounds):
        for name in names:
            show.notice(f"{name}, run {position + 1} of {request.rounds}")
            found[name].append(_in_new_process(name, request))
    show_bench.costs([_cost(name, runs) for name, runs in found.items()], request.images)


def _cost(name: str, runs: list[dict[str, Any]]) -> Cost:
    return Cost(
        name,
        tuple(float(one["seconds"]) for one in runs),
        int(statistics.median(one["peak"] for one in runs)),
        int(statistics.median(one["before"] for one in runs)),
    )


def _in_new_process(name: str, request: Request) -> dict[str, Any]:
    asked = asdict(replace(request, recipes=[name]))
    text = json.dumps(asked, default=str)
    command = [sys.executable, "-m", "fxq.cli.compile_time", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it died"])[-1]
        raise FxqError(f"compiling with {name} failed: {last}", where=request.name)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


# ---- in the new process ------------------------------------------------------------------------


def measure(request: Request) -> dict[str, Any]:
    """Seconds, peak memory and the memory before, of the one compilation that is asked for."""
    from . import load
    from .bench_peers import no_deprecations

    load.load_plugins(request.plugins)
    load.set_threads(request.threads)
    subject = load.load_subject(
        request.name, weights=request.weights, input_shape=request.input_shape, seed=request.seed
    )
    _, batches = calibration_batches(request, subject)
    (name,) = request.recipes
    engine = request.engine or Engine.FBGEMM
    with no_deprecations():
        work = _work(name, subject, batches, engine)
        before, start = peak_memory(), time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak_memory(), "before": before}


def _work(name: str, subject: Any, batches: list[Any], engine: Engine) -> Any:
    """The compilation, with everything it needs imported already."""
    if name == TORCH_AO:
        import torch.ao.quantization.quantize_fx  # noqa: F401

        from .bench_peers import torch_ao_int8

        model = subject.model
        return lambda: torch_ao_int8(model.module, model.example_inputs, batches, engine.value)
    import fxq.compiler  # noqa: F401
    from fxq.recipe import Recipe
    from fxq.registry import find_backend

    from .compile import compiled

    recipe = Recipe.load(name)
    find_backend("eager")
    return lambda: compiled(subject, recipe, batches, options={"engine": engine.value})


def peak_memory() -> int:
    """The largest memory this process has held, in bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Measure what the command line describes, and print it as JSON."""
    asked = json.loads(sys.argv[1])
    asked["engine"] = Engine(asked["engine"]) if asked["engine"] else None
    asked["weights"] = Path(asked["weights"]) if asked["weights"] else None
    asked["plugins"] = [Path(file) for file in asked["plugins"]]
    asked["input_shape"] = tuple(asked["input_shape"]) if asked["input_shape"] else None
    print(json.dumps(measure(Request(**asked))))


if __name__ == "__main__":
    main()
