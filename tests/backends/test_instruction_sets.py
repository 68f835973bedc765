"""The same artifact gives the same integers where the CPU has no VNNI instructions.

Libraries read at their start which instructions they may use, hence the process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxq
from fxq.backends import _kernels as kernels
from fxq.backends.eager import EagerModule
from fxq.integer.reference import Reference
from fxq.models_zoo import tiny_concat, tiny_depthwise, tiny_residual

RESTRICTED = {
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
RECIPES = ("minmax-int8", "aciq-8bit", "aciq-4bit", "aciq-3bit", "naive-4bit", "kld-4bit")


def differing(folder: Path, engine: str = "fbgemm") -> dict[str, int]:
    """In how many elements each register differs from the stored ones of the reference."""
    integers = fxq.load(folder).integers
    known = torch.load(folder.with_suffix(".pt"), weights_only=True)
    found = EagerModule(integers, engine).registers(known.pop(""))
    different = {name: int((found[name] != value).sum()) for name, value in known.items()}
    return {name: count for name, count in different.items() if count}


def main() -> None:
    """Prints what differs here, by the folder of the artifact."""
    torch.set_num_threads(1)
    folders = [path for path in sorted(Path(sys.argv[1]).iterdir()) if path.is_dir()]
    found: dict[str, Any] = {path.name: differing(path) for path in folders}
    from fxq.products import kernels as products

    exact = {
        "fbgemm": kernels.is_exact("fbgemm"),
        "int_mm": products.int_mm_is_exact(),
        "onednn": products.onednn_is_exact(),
        "product": _products_are_right(),
    }
    print(json.dumps({"differing": found, "exact": exact}))


def _products_are_right() -> bool:
    from fxq.products.geometry import Geometry
    from fxq.products.kernels import convolution, product

    left = torch.full((37, 256), 127, dtype=torch.int8)
    x = torch.full((1, 32, 16, 16), 127, dtype=torch.int8)
    weight = torch.full((16, 32, 3, 3), 127, dtype=torch.int8)
    sums = convolution(x, weight, Geometry(padding=(1, 1))).double()
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    products = product(left, left.t()).double()
    return torch.equal(sums, expected) and torch.equal(products, left.double() @ left.double().t())


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of several recipes and networks, and what the reference computes."""
    folder = tmp_path_factory.mktemp("artifacts")
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for build in (tiny_residual, tiny_depthwise, tiny_concat):
        for recipe in RECIPES:
            done = fxq.compile(build(), x[:1], recipe, calibration=[x], check=False)
            path = done.artifact.save(folder / f"{recipe}-{build.__name__}")
            values = Reference(done.artifact.integers).run(x * 3)[1]
            grids = done.artifact.integers.grids()
            codes = {name: values[name] for name, grid in grids.items() if grid is not None}
            tensors = {name: value for name, value in codes.items() if isinstance(value, Tensor)}
            torch.save({**tensors, "": x * 3}, path.with_suffix(".pt"))
    return folder


@pytest.fixture(scope="module")
def restricted(place: Path) -> dict[str, Any]:
    """What a process finds that may use AVX2 and nothing later."""
    done = subprocess.run(
        [sys.executable, __file__, str(place)],
        env={**os.environ, **RESTRICTED},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_kernels_do_saturate_there(restricted: dict[str, Any]) -> None:
    """Else the other tests show nothing; products of training notice it, and are right."""
    assert restricted["exact"] == {
        "fbgemm": False,
        "int_mm": False,
        "onednn": False,
        "product": True,
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_integers_are_the_same(recipe: str, restricted: dict[str, Any], place: Path) -> None:
    names = [name for name in restricted["differing"] if name.startswith(recipe)]
    assert len(names) == 3
    for name in names:
        assert restricted["differing"][name] == {}, name
        assert differing(place / name) == {}, name


if __name__ == "__main__":
    main()
