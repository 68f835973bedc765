"""Mutants of artifacts, recipes and checkpoints: each loads to the same, or is an error of fxq.

    python tests/benchmarks/mutations.py --count 500 --seed 0

Prints a line of JSON per mutant: what was changed and what came of it, which is ``same``,
``refused``, or ``other``: another valid program, which only files without a checksum can become.
Anything else is ``bug``: another exception, a program that ran, a file written outside, an absurd
amount of memory; or a mutant that takes longer than a minute. A crash ends the list.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import mutants

import fxq
from fxq.artifact import load
from fxq.checksums import FILE as SEAL
from fxq.errors import FxqError
from fxq.models_zoo import tiny_conv, tiny_depthwise, tiny_residual
from fxq.recipe import Recipe, builtin_files
from fxq.training.checkpoint import Checkpoint, Position

RECIPES = ("minmax-int8", "aciq-4bit", "aciq-paper-4w4a", "apot-4bit", "naive-4bit")
MEMORY = 3 * 2**30
SECONDS = 60
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")


class Forbidden(BaseException):
    """A mutant did what no file may make fxq do."""


class Guard:
    """Watches what Python is asked to do while a mutant is read."""

    def __init__(self, allowed: Path) -> None:
        self._allowed = str(allowed)
        self._on = False
        sys.addaudithook(self._see)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Programs, connections and files written elsewhere are noticed inside."""
        self._on = True
        signal.alarm(SECONDS)
        try:
            yield
        finally:
            signal.alarm(0)
            self._on = False

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in FORBIDDEN:
            raise Forbidden(f"{event} {arguments}")
        if event == "open" and self._writes(*arguments):
            raise Forbidden(f"{arguments} is written")

    def _writes(self, path: Any, mode: Any, flags: int) -> bool:
        is_written = bool(flags & (os.O_WRONLY | os.O_RDWR))
        inside = str(path).startswith((self._allowed, tempfile.gettempdir()))
        return is_written and isinstance(path, (str, bytes)) and not inside


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


# ---- what is mutated -----------------------------------------------------------------------------


def make_subjects(place: Path) -> dict[str, Callable[[Path], Any]]:
    """Whole folders under a place, by name, and how each is read: it gives what to compare."""
    x = images()
    for name, model, backend in (
        ("eager", tiny_residual(), "eager"),
        ("plain", tiny_depthwise(), "eager"),
        ("onnx", tiny_conv(), "onnx"),
    ):
        options = {} if backend == "eager" else {"backend": backend}
        result = fxq.compile(model, x[:1], "aciq-4bit", calibration=[x], check=False, **options)
        result.artifact.save(place / name)
    (place / "recipe").mkdir()
    for name in RECIPES:
        shutil.copy(builtin_files()[name], place / "recipe" / f"{name}.toml")
    (place / "checkpoint").mkdir()
    state = tiny_conv().state_dict()
    position = Position([2.0, 1.5], [{"epoch": 1, "loss": 1.75}], 3.0, 0.5)
    Checkpoint({"epochs": 2}, position, state, {}).save(place / "checkpoint/c.safetensors")
    return {
        **dict.fromkeys(("eager", "plain", "onnx"), run_artifact),
        "recipe": lambda folder: [run_recipe(path) for path in sorted(folder.glob("*.toml"))],
        "checkpoint": run_checkpoint,
    }


def run_artifact(folder: Path) -> Any:
    artifact = load(folder)
    str(artifact.warnings), str(artifact.journal), artifact._repr_html_()
    return artifact(images())


def run_recipe(path: Path) -> Any:
    recipe = Recipe.load(path)
    text = recipe.to_toml()
    if Recipe.from_toml(text).to_toml() != text:
        raise AssertionError("the recipe does not survive being written")
    if recipe.training or path.read_bytes() == builtin_files()[path.stem].read_bytes():
        return text
    x = images()
    return text, fxq.compile(tiny_conv(), x[:1], recipe, calibration=[x], check=False).artifact(x)


def run_checkpoint(folder: Path) -> Any:
    found = Checkpoint.load(folder / "c.safetensors")
    return dict(found.identity), vars(found.position), found.model, found.momentum


# ---- what comes of it ----------------------------------------------------------------------------


def is_same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(is_same, left, right))
    return bool(left == right)


def outcome(read: Callable[[Path], Any], folder: Path, expected: Any, guard: Guard) -> str:
    """``same``, ``other``, ``refused: …`` or ``bug: …``."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with guard.watching():
            found = read(folder)
    except FxqError as error:
        return f"refused: {error.what[:120]}" if error.what else "bug: an error without a word"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return f"bug: {type(error).__name__} {str(error)[:200]} at {place}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > 2**20:  # in kB
        return f"bug: it took {grown} kB"
    return "same" if is_same(expected, found) else "other"


def run(count: int, seed: int, only: str = "") -> Iterator[dict[str, Any]]:
    """What came of each mutant."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        subjects = make_subjects(place)
        expected = {one: read(place / one) for one, read in subjects.items()}
        guard = Guard(place)
        limit_memory()
        names = [one for one in subjects if one.startswith(only)]
        for number in range(count):
            random = Random(f"{seed} {number}")
            one = names[number % len(names)]
            folder = place / "mutant"
            shutil.copytree(place / one, folder)
            told = mutate(folder, random)
            print(f"# {number} {one} {told}", file=sys.stderr, flush=True)
            result = outcome(subjects[one], folder, expected[one], guard)
            if result == "other" and told["sealed"]:
                result = "bug: it computes something else"
            yield {"number": number, "subject": one, **told, "outcome": result}
            shutil.rmtree(folder)
            left = {path.name for path in place.iterdir()} - set(subjects)
            if left:
                raise Forbidden(f"{left} were written")


def mutate(folder: Path, random: Random) -> dict[str, Any]:
    """One file is changed; every second artifact has no checksums, as those of older versions."""
    is_artifact = (folder / SEAL).exists()
    if is_artifact and random.random() < 0.5:
        (folder / SEAL).unlink()
    sealed = (folder / SEAL).exists() or (folder / "c.safetensors").exists()
    file = random.choice(sorted(path for path in folder.iterdir() if path.suffix != ".txt"))
    change = random.choice(mutants.changes_for(file))
    return {"file": file.name, "sealed": sealed, "change": change(file, random)}


def limit_memory() -> None:
    """No more than `MEMORY` can be added to what is mapped now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _late(*_: Any) -> None:
    raise Forbidden(f"it takes longer than {SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="eager, plain, onnx, recipe or checkpoint")
    given = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    counts: Counter[str] = Counter()
    for result in run(given.count, given.seed, given.only):
        counts[result["outcome"].partition(":")[0]] += 1
        print(json.dumps(result), flush=True)
    print(dict(counts), file=sys.stderr)
    sys.exit(1 if counts["bug"] else 0)


if __name__ == "__main__":
    main()
