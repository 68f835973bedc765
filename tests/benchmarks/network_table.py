"""What becomes of known networks: captured how, how much on integers, exact or not, and how fast.

    python tests/benchmarks/network_table.py --folder found --out table.md
    python tests/benchmarks/network_table.py --folder found --only 'timm/*' --out table.csv

Every network is compiled in a process of its own with a limit on its time, so that a crash is a row
of the table. The row is kept in the folder as JSON, and not made again. Each network is captured
whole, or in its largest traceable parts; the eager module and ONNX Runtime run on inputs that were
not calibrated on, and every register is compared with what the integer reference computes.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import functools
import importlib
import json
import multiprocessing
import os
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from network_list import Network, networks
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

import fxq
from fxq.artifact import Artifact
from fxq.contracts import tensors_of
from fxq.errors import CaptureError, FxqError, PassError
from fxq.integer.comparison import Comparison
from fxq.integer.differences import Kind
from fxq.integer.reference import Reference
from fxq.parts.calls import recorded
from fxq.registry import find_backend

Row = dict[str, Any]
HEAD = (
    "network", "input", "parameters", "captured", "layers", "on int8", "weights",
    "compile", "eager = reference", "ONNX = reference", "argmax", "to float",
)  # fmt: skip


# ---- one network, in a process of its own --------------------------------------------------------


class Compiled:
    """A network that was compiled whole or in parts.

    Args:
        network: The network.
        recipe: The recipe's name.
    """

    def __init__(self, network: Network, recipe: str) -> None:
        model = network.module()
        example, *data, self.images = (
            network.inputs(count, torch.Generator().manual_seed(seed))
            for seed, count in enumerate((1, 2, 2, 2))
        )
        self.parameters = sum(one.numel() for one in model.parameters())
        self.gaps: list[Row] = []
        self.left: list[str] = []
        self.pieces: dict[str, tuple[nn.Module, Artifact, tuple[Tensor, ...]]] = {}
        start = time.perf_counter()
        try:
            whole = fxq.compile(model, example, recipe, calibration=data)
            self.pieces[""] = (model, whole.artifact, self.images)
        except CaptureError:
            self._in_parts(fxq.compile_parts(model, example, recipe, calibration=data))
        self.seconds = time.perf_counter() - start

    def _in_parts(self, result: fxq.PartialResult) -> None:
        survey = result.survey
        self.left = survey.left
        self.gaps = [vars(gap) for gap in survey.gaps]
        with torch.no_grad():
            result.module(*self.images)
        for path, artifact in result.artifacts.items():
            module = survey.model.get_submodule(path)
            (call,) = recorded(survey.model, self.images, module, 1)
            inputs = call.tensors(survey.parts[path].arguments.tensors)
            self.pieces[path] = (survey.parts[path].graph, artifact, inputs)

    def row(self) -> Row:
        """What is known before anything runs."""
        entries = [e for _, artifact, _ in self.pieces.values() for e in artifact.ledger.entries]
        layers = [one for one in entries if one.layer]
        floats = [one for one in layers if one.where != "int8"]
        opaque = Counter(one.op for one in entries if one.op in OPAQUE)
        return {
            "parameters": self.parameters,
            "parts": 0 if "" in self.pieces else len(self.pieces),
            "gaps": self.gaps,
            "left": self.left,
            "layers": len(layers) + len(self.left),
            "int8": len(layers) - len(floats),
            "weights": sum(int8_weights(artifact) for _, artifact, _ in self.pieces.values()),
            "in float": Counter(f"{one.op}: {one.why}" for one in floats),
            "opaque": opaque,
            "seconds": self.seconds,
        }


def int8_weights(artifact: Artifact) -> int:
    """How many weights integer layers multiply."""
    program = artifact.integers
    grids = program.grids()
    layers = (s for s in program if s.op in ("conv", "linear") and grids.get(s.inputs[0]))
    return sum(program.tensors[name].numel() for name in {s.tensors["weight"] for s in layers})


OPAQUE = (
    "MultiheadAttention", "LSTM", "GRU", "RNN", "Transformer", "TransformerEncoder",
    "TransformerEncoderLayer",
)  # fmt: skip
"""Modules of torch that hold weights, and stay one node in float."""


def measure(network: Network, recipe: str, keep: Callable[[Row], None]) -> None:
    """Everything about one network is kept, as it is found."""
    row: Row = {"size": network.size}
    stage = "compile"
    try:
        compiled = Compiled(network, recipe)
        keep(row := row | compiled.row())
        for stage in ("eager", "onnx"):
            found = [compared(stage, *one) for one in compiled.pieces.values()]
            keep(row := row | {stage: joined(found)})
    except FxqError as error:
        what = "crash" if isinstance(error, PassError) else "refusal"
        keep(row | {f"{stage} {what}": " | ".join(str(error).split("\n  "))})
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        keep(row | {f"{stage} crash": f"{type(error).__name__}: {error} ({place})"})
        traceback.print_exc()


def compared(stage: str, model: nn.Module, artifact: Artifact, inputs: tuple[Tensor, ...]) -> Row:
    """One runtime against the reference, and against the network in float."""
    program = artifact.integers
    start = time.perf_counter()
    module: Any = artifact.module if stage == "eager" else find_backend("onnx").load(program)
    seconds = time.perf_counter() - start
    expected, registers = Reference(program).run(*inputs)
    comparison = Comparison(program)
    comparison.add(inputs, registers, module.registers(*inputs))
    with torch.no_grad():
        wanted, output = model(*inputs), module(*inputs)
    layers = comparison.layers.values()
    integer = [one for one in layers if one.kind is not Kind.FLOAT]
    same = all(map(torch.equal, tensors_of(expected), tensors_of(output)))
    return {
        "elements": sum(one.elements for one in integer),
        "introduced": sum(one.introduced for one in integer),
        "float introduced": max(
            (one.largest_introduced / max(one.magnitude, 1.0) for one in layers), default=0.0
        ),
        "worst": [f"{e.name} ({e.op}): {e.introduced}" for e in integer if e.introduced],
        "unseen": sum(not one.seen for one in integer),
        "same output": same,
        "decisions": comparison.output.decisions,
        "agreeing": comparison.output.agreeing,
        "fidelity": fidelity(tensors_of(wanted), tensors_of(output)),
        "seconds": seconds,
    }


def joined(found: Sequence[Row]) -> Row:
    """The comparisons of all parts as one."""
    total = {key: sum(one[key] for one in found) for key in ("elements", "introduced", "unseen")}
    total |= {key: sum(one[key] for one in found) for key in ("decisions", "agreeing", "seconds")}
    return total | {
        "float introduced": max(one["float introduced"] for one in found),
        "worst": [text for one in found for text in one["worst"]][:5],
        "same output": all(one["same output"] for one in found),
        "fidelity": min(one["fidelity"] for one in found),
    }


def fidelity(wanted: Iterable[Tensor], found: Iterable[Tensor]) -> float:
    """The signal in decibels over the noise of quantizing, of the worst output."""
    return min(
        10 * float(torch.log10(a.double().square().sum() / (a - b).double().square().sum()))
        for a, b in zip(wanted, found, strict=True)
    )


def work(network: Network, recipe: str, file: Path) -> None:
    """What a child process does: the row is in the file, and what it says in a log."""
    with file.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    measure(network, recipe, lambda row: _write(file, row))


def _write(file: Path, row: Row) -> None:
    file.write_text(json.dumps(row, indent=1))


# ---- all of them ---------------------------------------------------------------------------------


def row_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '--')}.json"


def row_of(network: Network, given: argparse.Namespace) -> Row:
    """What became of a network; made in a process of its own unless it is known."""
    file = row_file(given.folder, network.name)
    if file.exists():
        return json.loads(file.read_text())
    part = file.with_suffix(".part")
    _write(part, {"size": network.size})
    start, failure = time.perf_counter(), ""
    # Forked, so that a process does not import torch, torchvision and timm anew.
    process = multiprocessing.get_context("fork").Process(
        target=work, args=(network, given.recipe, part)
    )
    process.start()
    process.join(given.seconds)
    if process.is_alive():
        process.kill()
        process.join()
        failure = f"it takes longer than {given.seconds} s"
    elif process.exitcode:
        failure = f"the process ended with {process.exitcode}"
    row = json.loads(part.read_text()) | {"name": network.name, "failure": failure}
    row["took"] = time.perf_counter() - start
    _write(file, row)
    part.unlink()
    return row


def prepare() -> None:
    """What all processes need is imported; torch.onnx would read its library at every export."""
    read = ONNXRegistry.from_torchlib
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(read))
    importlib.import_module("onnxruntime")
    warnings.simplefilter("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="networks whose names match, comma-separated")
    parser.add_argument("--size", type=int, default=96, help="side of images, a multiple of 32")
    parser.add_argument("--recipe", default="minmax-int8")
    parser.add_argument("--seconds", type=int, default=400, help="limit per network")
    parser.add_argument("--folder", type=Path, default=Path("network-table"), help="for the rows")
    parser.add_argument("--out", type=Path, action="append", default=[], help=".md or .csv")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    patterns = given.only.split(",")
    listed = networks(given.size)
    wanted = [listed[n] for n in listed if any(fnmatch.fnmatch(n, p) for p in patterns)]
    prepare()
    rows = []
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(wanted))
        for network in wanted:
            progress.update(bar, description=network.name)
            rows.append(row_of(network, given))
            progress.console.print(" | ".join(cells(rows[-1])))
            progress.advance(bar)
    for file in given.out:
        write(rows, file)
    print(counts(rows))


# ---- the table -----------------------------------------------------------------------------------


def captured(row: Row) -> str:
    if "parts" not in row:
        return "refused" if "compile refusal" in row else "failed"
    return f"{row['parts']} parts" if row["parts"] else "whole"


def is_exact(found: Row) -> bool:
    return not found["introduced"]


def verdict(row: Row, stage: str) -> str:
    """How a runtime compares with the reference."""
    if stage not in row:
        return "refused" if f"{stage} refusal" in row else "-"
    found = row[stage]
    if is_exact(found):
        return "equal"
    return f"{found['introduced']} of {found['elements']} differ"


def cells(row: Row) -> list[str]:
    onnx = row.get("onnx") or {}
    agreed = f"{onnx['agreeing']}/{onnx['decisions']}" if onnx.get("decisions") else "-"
    known = "layers" in row
    share = 100 * row["int8"] / row["layers"] if known and row["layers"] else 0.0
    return [
        row["name"],
        row.get("size", "-"),
        f"{row['parameters'] / 1e6:.2f} M" if known else "-",
        captured(row),
        str(row["layers"]) if known else "-",
        f"{share:.0f} %" if known else "-",
        f"{100 * row['weights'] / row['parameters']:.0f} %" if known else "-",
        f"{row['seconds']:.1f} s" if known else "-",
        verdict(row, "eager"),
        verdict(row, "onnx"),
        agreed,
        f"{row['eager']['fidelity']:.0f} dB" if "eager" in row else "-",
    ]


def remarks(row: Row) -> list[str]:
    """What there is to say beside the table."""
    reasons: dict[str, list[Row]] = {}
    for gap in row.get("gaps", []):
        reasons.setdefault(gap["why"], []).append(gap)
    found = [f"as written: {of_kinds(gaps)}: {why}" for why, gaps in reasons.items()]
    left = row.get("left", [])
    found += [f"{len(left)} layers in no part, such as {left[0]}"] if left else []
    found += [f"{n} stay in float: {why}" for why, n in row.get("in float", {}).items()]
    found += [f"{n} {op} stay in float, one node each" for op, n in row.get("opaque", {}).items()]
    for stage in ("compile", "eager", "onnx"):
        for what in ("refusal", "crash"):
            if f"{stage} {what}" in row:
                found.append(f"{stage} {what}: {row[f'{stage} {what}']}")
        found += [f"{stage} differs in {one}" for one in row.get(stage, {}).get("worst", [])]
    return found + ([row["failure"]] if row["failure"] else [])


def of_kinds(gaps: Sequence[Row]) -> str:
    """The modules' classes, and where the first of them is."""
    kinds = Counter(gap["kind"] for gap in gaps)
    names = (kind if count == 1 else f"{count} {kind}" for kind, count in kinds.items())
    place = re.sub(r"\S*?(torchvision|timm)/(?=models)", r"\1/", gaps[0]["where"])
    return f"{', '.join(names)} ({place})"


def counts(rows: Sequence[Row]) -> str:
    """The table in a sentence."""
    kinds = Counter(captured(row).partition(" ")[2] or captured(row) for row in rows)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    bad = sum(bool(row["failure"]) or any(key.endswith("crash") for key in row) for row in rows)
    exact = {
        stage: sum(stage in row and is_exact(row[stage]) for row in rows)
        for stage in ("eager", "onnx")
    }
    return (
        f"{len(rows)} networks: {told}; eager equals the reference in {exact['eager']}, ONNX "
        f"Runtime in {exact['onnx']}; {bad} crashed or timed out"
    )


def write(rows: Sequence[Row], file: Path) -> None:
    if file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([(*HEAD, "remarks")])
            csv.writer(stream).writerows([*cells(one), "; ".join(remarks(one))] for one in rows)
        return
    lines = [counts(rows), "", f"| {' | '.join(HEAD)} |", f"| {' | '.join(['---'] * len(HEAD))} |"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    told: dict[str, list[str]] = {}
    for row in rows:
        for text in remarks(row):
            told.setdefault(text, []).append(f"`{row['name']}`")
    lines += ["", *(f"- {', '.join(names)}: {text}" for text, names in told.items())]
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
