"""Random networks through every recipe and both backends: what must hold of each of them.

    python tests/benchmarks/random_networks.py found.jsonl --count 500 --seed 0 --jobs 2
    python tests/benchmarks/random_networks.py --network 17 --recipes apot-4bit [--blocks 2]

Of every network and recipe: each pass keeps its contract; the eager module equals the integer
reference in every element of every register; ONNX Runtime does in all that is integers, and to
1e-4 in what is float; an artifact that is saved and loaded computes the same, and is saved to the
same bytes; compiling again gives the same bits; a trained module in eval mode computes what it is
lowered to. Recipes that simulate a paper's settings have few integers, and stay on one backend.

What torch.onnx cannot export is a refusal, not a violation, and the rest holds nevertheless.

What was run is appended to the file, and not run again. Each violation is a line with the seed of
its network; a crash ends the list. The second form runs one network and prints its source; fewer
blocks make it smaller.
Exporting takes most of the time: with ``--every 4`` ONNX Runtime has a quarter of the recipes of
each network, others of the next.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import itertools
import json
import multiprocessing
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.onnx._internal.exporter._registration import ONNXRegistry

sys.path.insert(0, str(Path(__file__).parents[1]))

from drawn_networks import Network, draw

import fxq
from fxq.artifact import Artifact
from fxq.contracts import tensors_of
from fxq.errors import LoweringError
from fxq.integer.comparison import Comparison
from fxq.integer.differences import Kind, Layer
from fxq.integer.reference import Reference
from fxq.recipe import Recipe, builtin_files

QUICK = {"adaround.iterations": 20, "reconstruct.iterations": 3, "reconstruct.batch_size": 4}
"""Options of long passes."""
FLOAT_TOLERANCE = 1e-4
"""How far a float of ONNX Runtime may be from torch's, relative to its register's largest, or 1."""
FROM_TORCHLIB = ONNXRegistry.from_torchlib
SECONDS = 300
"""How long one recipe may take on one network."""


class ViolationError(Exception):
    """Something that must hold does not."""


# ---- compiling -----------------------------------------------------------------------------------


def quick(name: str) -> Recipe:
    """The recipe with few iterations."""
    recipe = Recipe.load(name)
    used = {one.name for one in recipe.passes}
    settings = [f"{k}={v}" for k, v in QUICK.items() if k.partition(".")[0] in used]
    return recipe.with_settings(settings)


def compiled(network: Network, recipe: Recipe, backend: str, *, check: bool) -> Artifact:
    """The network on a backend, trained for two steps where the recipe trains."""
    x, *_ = network.calibration
    options: dict[str, Any] = {} if recipe.training else {"backend": backend}
    result = fxq.compile(
        network.model, x, recipe, calibration=network.calibration, check=check, **options
    )
    if not recipe.training:
        return result.artifact
    train(result.module, network)
    artifact = fxq.lower(result.module, backend)
    if backend == "eager":
        with torch.no_grad():
            own = result.module.eval()(network.images)
        expect(equal(own, artifact(network.images)), "eval mode differs from what it is lowered to")
    return artifact


def train(module: torch.nn.Module, network: Network) -> None:
    """Two steps have been taken; none where all layers are dead."""
    parameters = list(module.parameters())
    if not parameters:
        return
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    batch = torch.cat(network.calibration)
    batch.requires_grad_()  # torch 2.13 crashes in group norms of channels-last constants
    for _ in range(2):
        optimizer.zero_grad()
        sum(one.square().mean() for one in tensors_of(module(batch))).backward()
        optimizer.step()


# ---- what must hold ------------------------------------------------------------------------------


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ViolationError(otherwise)


def equal(left: Any, right: Any) -> bool:
    """Whether two outputs are the same bits; NaN is the same as NaN."""
    pairs = zip(tensors_of(left), tensors_of(right), strict=True)
    return all(torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0)) for a, b in pairs)


def check(network: Network, recipe: Recipe, *, onnx: bool) -> str:
    """Everything holds; why there is no ONNX model, where it was wanted and there is none.

    Raises:
        ViolationError: Something does not.
    """
    artifact = compiled(network, recipe, "eager", check=True)
    again, refusal = compiled_again(network, recipe, onnx=onnx and not recipe.simulation)
    expect(same_program(artifact, again), "compiling again gives another program")
    expected, registers = Reference(artifact.integers).run(network.images)
    for one in (artifact, again):
        check_runtime(one, network.images, expected, registers)
        check_saved(one, network.images)
    return refusal


def compiled_again(network: Network, recipe: Recipe, *, onnx: bool) -> tuple[Artifact, str]:
    try:
        return compiled(network, recipe, "onnx" if onnx else "eager", check=False), ""
    except LoweringError as error:
        return compiled(network, recipe, "eager", check=False), f"{error.what}: {error.where}"


def same_program(one: Artifact, other: Artifact) -> bool:
    ours, theirs = one.integers, other.integers
    if ours.to_json() != theirs.to_json() or ours.tensors.keys() != theirs.tensors.keys():
        return False
    return all(torch.equal(value, theirs.tensors[name]) for name, value in ours.tensors.items())


def check_runtime(
    artifact: Artifact, images: torch.Tensor, expected: Any, registers: dict[str, Any]
) -> None:
    comparison = Comparison(artifact.integers)
    module: Any = artifact.module
    comparison.add((images,), registers, module.registers(images))
    for layer in comparison.layers.values():
        tolerance = FLOAT_TOLERANCE if artifact.backend == "onnx" and is_float(layer) else 0.0
        introduced = layer.largest_introduced / max(layer.magnitude, 1.0)
        expect(
            introduced <= tolerance,
            f"{artifact.backend}: %{layer.name} ({layer.op}) differs in {layer.introduced} of "
            f"{layer.elements} elements, by {layer.largest_introduced:.3g}",
        )
    if not any(layer.differing for layer in comparison.layers.values()):
        expect(equal(artifact(images), expected), f"{artifact.backend}: the output differs")


def is_float(layer: Layer) -> bool:
    return layer.kind is Kind.FLOAT


def check_saved(artifact: Artifact, images: torch.Tensor) -> None:
    with tempfile.TemporaryDirectory() as name:
        first, second = Path(name, "first"), Path(name, "second")
        artifact.save(first)
        loaded = fxq.load(first)
        expect(equal(loaded(images), artifact(images)), f"{artifact.backend}: loaded, it differs")
        loaded.save(second)
        for file in sorted(set(first.iterdir()) - {first / "journal.json", first / "SHA256SUMS"}):
            same = file.read_bytes() == (second / file.name).read_bytes()
            expect(same, f"{artifact.backend}: {file.name} differs when it is saved again")


# ---- running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One recipe on one network.

    Attributes:
        seed: Of the network.
        recipe: Its name.
        onnx: Whether ONNX Runtime takes part.
    """

    seed: int
    recipe: str
    onnx: bool


def outcome(network: Network, task: Task) -> dict[str, Any]:
    """The task, and what was found: ``violation`` is empty where everything holds."""
    violation = refusal = ""
    signal.alarm(SECONDS)
    try:
        refusal = check(network, quick(task.recipe), onnx=task.onnx)
    except ViolationError as error:
        violation = str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        violation = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    finally:
        signal.alarm(0)
    return {**asdict(task), "refusal": refusal, "violation": violation.replace("\n", " ")}


def outcomes(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """What came of one network."""
    prepare()
    network = draw(tasks[0].seed)
    return [outcome(network, task) for task in tasks]


def prepare() -> None:
    """This process is ready: torch.onnx would read its library anew at every export."""
    faulthandler.enable()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    ONNXRegistry.from_torchlib = staticmethod(_torchlib)


@functools.cache
def _torchlib(opset_version: int) -> ONNXRegistry:
    return FROM_TORCHLIB(opset_version)


def _late(*_: Any) -> None:
    raise ViolationError(f"it takes longer than {SECONDS} s")


def tasks_of(given: argparse.Namespace, seeds: Iterable[int]) -> list[Task]:
    """Every recipe on every network."""
    names = given.recipes.split(",")
    return [
        Task(seed, name, onnx=(seed + index) % given.every == 0)
        for seed in seeds
        for index, name in enumerate(names)
    ]


def run(work: list[list[Task]], jobs: int) -> Iterator[list[dict[str, Any]]]:
    """What came of each network, as it comes."""
    if jobs == 1:
        yield from map(outcomes, work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        for future in as_completed([pool.submit(outcomes, tasks) for tasks in work]):
            yield future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path, nargs="?", help="file of JSON lines to continue")
    parser.add_argument("--count", type=int, default=500, help="networks")
    parser.add_argument("--seed", type=int, default=0, help="of the first of them")
    parser.add_argument("--recipes", default=",".join(builtin_files()), help="by name")
    parser.add_argument("--every", type=int, default=1, help="ONNX Runtime has every so manieth")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--network", type=int, help="run this one alone")
    parser.add_argument("--blocks", type=int, help="of that one")
    given = parser.parse_args()
    sys.exit(many_networks(given) if given.network is None else one_network(given))


def one_network(given: argparse.Namespace) -> bool:
    """Its source, and what came of it; whether something is wrong."""
    prepare()
    network = draw(given.network, given.blocks)
    shapes = [list(one.shape) for one in network.calibration]
    print(f"{network.source}\ncalibration: {shapes}, strides {network.images.stride()}\n")
    rows = [outcome(network, task) for task in tasks_of(given, [given.network])]
    for row in rows:
        print(f"{row['recipe']:22} {row['violation'] or row['refusal'] or 'holds'}")
    return any(row["violation"] for row in rows)


def many_networks(given: argparse.Namespace) -> bool:
    """Every violation is a line; whether there is one."""
    table: Path | None = given.table
    lines = table.read_text().splitlines() if table is not None and table.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["seed"], row["recipe"]) for row in rows}
    seeds = range(given.seed, given.seed + given.count)
    left = [one for one in tasks_of(given, seeds) if (one.seed, one.recipe) not in done]
    work = [list(tasks) for _, tasks in itertools.groupby(left, lambda task: task.seed)]
    columns = (TextColumn("networks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        shown = progress.add_task("", total=len(seeds), completed=len(seeds) - len(work))
        for found in run(work, given.jobs):
            rows += found
            if table is not None:
                with table.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)
            for row in found:
                if row["violation"]:
                    print(f"{row['seed']} {row['recipe']}: {row['violation']}", flush=True)
            progress.advance(shown)
    return tell(rows)


def tell(rows: Sequence[dict[str, Any]]) -> bool:
    """The counts, and what was refused; whether there is a violation."""
    wrong = sum(bool(row["violation"]) for row in rows)
    networks = len({row["seed"] for row in rows})
    compared = sum(row["onnx"] and not row["refusal"] for row in rows)
    print(f"{networks} networks, {len(rows)} runs ({compared} on ONNX Runtime), {wrong} violations")
    for refusal, count in Counter(row["refusal"] for row in rows if row["refusal"]).most_common():
        print(f"{count:6} x {refusal}")
    return bool(wrong)


if __name__ == "__main__":
    main()
