"""Trainings with the same options side by side: float, 8 and 16 bits throughout, and adaptive.

Each starts from the same random weights and sees the same batches. Every training keeps a folder
with its checkpoint and is continued there; the table is made from what they logged. The accuracies
are those of the module that trained, in float arithmetic, and of the one lowered to integers.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxq
from fxq.models_zoo.accuracy import evaluate_top1
from fxq.models_zoo.builtin import builtin_data
from fxq.models_zoo.datasets import open_images
from fxq.registry import find_network
from fxq.trainable import TrainingModule
from fxq.training import TrainingOptions, Watch, fit
from fxq.training.widths import last_widths

FLOAT = "fp32"
RECIPES = (FLOAT, "static-int8", "static-int16", "adaptive-fixed-point")
HEAD = ("network", "seed", "recipe", "trained", "lowered", "loss", "seconds", "widths", "adjusted")


def main() -> None:
    asked = _arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    asked.folder.mkdir(parents=True, exist_ok=True)
    rows = [_one(asked, seed, name) for seed in asked.seed for name in asked.recipe]
    path = asked.folder / f"{asked.network.replace('/', '-')}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEAD)
        writer.writerows([row[name] for name in HEAD] for row in rows)
    _tell(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "network", help="a name of fxq models, with data built in or --train/--test"
    )
    parser.add_argument("--train", help="images to train on")
    parser.add_argument("--test", help="images to measure on")
    parser.add_argument("--recipe", action="append", default=None)
    parser.add_argument("--seed", action="append", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=Path("adaptive-accuracy"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--option", action="append", default=[], help="of TrainingOptions: lr=0.1")
    found = parser.parse_args()
    found.recipe, found.seed = found.recipe or list(RECIPES), found.seed or [0]
    return found


def _one(asked: argparse.Namespace, seed: int, name: str) -> dict[str, Any]:
    folder = asked.folder / f"{asked.network.replace('/', '-')}-{name}-{seed}"
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())  # type: ignore[no-any-return]
    entry = find_network(asked.network)
    network = entry.build(seed)
    train, test = _data(entry, asked.train, "train"), _data(entry, asked.test, "test")
    module: nn.Module = copy.deepcopy(network)
    if name != FLOAT:
        module = fxq.compile(network, entry.example(), name).module
    options = TrainingOptions(**{"seed": seed, **_options(asked.option)})
    watch = Watch(on_epoch=lambda row: print(name, seed, _line(row), flush=True))

    def measured(own: nn.Module) -> float:
        return evaluate_top1(own, test, limit=1024).top1

    training = fit(module, train, options, folder=folder, watch=watch, evaluate=measured)
    result = {
        "network": asked.network,
        "seed": seed,
        "recipe": name,
        "trained": _score(module, test, exact=False),
        "lowered": _score(module, test, exact=True),
        "loss": training.rows[-1]["train_loss"],
        "seconds": sum(row["seconds"] or 0 for row in training.rows),
        "widths": json.dumps(last_widths(module)),
        "adjusted": training.rows[-1].get("adjusted", ""),
    }
    done.write_text(json.dumps(result))
    return result


def _score(module: nn.Module, test: Any, *, exact: bool) -> float:
    if isinstance(module, TrainingModule):
        module.exact = exact
    return evaluate_top1(module, test).top1


def _data(entry: Any, path: str | None, split: str) -> Any:
    if path is None:
        return builtin_data(entry.data, split)
    return open_images(path, normalization=entry.normalization, size=entry.size, split=split)


def _options(pairs: list[str]) -> dict[str, Any]:
    split = (pair.partition("=") for pair in pairs)
    return {
        name: json.loads(value) if value[0] in "-.0123456789tf" else value
        for name, _, value in split
    }


def _line(row: Any) -> str:
    kept = ("epoch", "train_loss", "train_accuracy", "test_accuracy", "seconds", "adjusted")
    shown = [name for name in row if name in kept or name.endswith("gradients")]
    return "  ".join(f"{name} {row[name]:.4g}" for name in shown if row[name] is not None)


def _tell(rows: list[dict[str, Any]]) -> None:
    head = f"{'trained %':>22}{'lowered %':>22}{'loss':>9}{'s':>7}  widths"
    print(f"\n{'network':<22}{'recipe':<22}{head}")
    for network, recipe in dict.fromkeys((row["network"], row["recipe"]) for row in rows):
        own = [row for row in rows if (row["network"], row["recipe"]) == (network, recipe)]
        loss = statistics.mean(row["loss"] for row in own)
        seconds = statistics.mean(row["seconds"] for row in own)
        scores = [_spread([100 * row[name] for row in own]) for name in ("trained", "lowered")]
        print(
            f"{network:<22}{recipe:<22}{scores[0]:>22}{scores[1]:>22}{loss:>9.4f}{seconds:>7.0f}  "
            f"{own[0]['widths']}  adjusted {own[0]['adjusted']}"
        )


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f}" + (f" ({min(values):.2f}..{max(values):.2f})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
