"""``fxq verify``: what it prints, whom it blames, and how it ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxq import registry
from fxq.backends.eager import EagerModule
from fxq.checksums import seal
from fxq.cli import verify_data, verify_runtimes
from fxq.cli.options import Flavor
from fxq.errors import FxqError
from fxq.integer.program import IntegerProgram
from fxq.integer.reference import Reference

Write = Callable[..., Path]

EAGER = ("--runtime", "eager", "--images", "16", "--layers-images", "4")
QUICK = ("compile", "tiny/residual", "-r", "minmax-int8", "-c", "random", "-n", "4", "-o", "out")


def faulty_registers(program: IntegerProgram, layer: str, x: Tensor) -> dict[str, Any]:
    """What a runtime shows whose one layer adds 1 to its codes."""
    reference, values = Reference(program), {program.inputs[0]: x}
    for step in program:
        values[step.name] = reference.step(step, values)
        if step.name == layer:
            assert step.grid is not None
            values[layer] = (values[layer] + 1).clamp(max=step.grid.top)
    return values


@pytest.fixture
def break_eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Call it as ``break_eager(layer)``: that layer of every eager module shows wrong codes."""

    def broken(layer: str) -> None:
        def registers(self: EagerModule, x: Tensor) -> dict[str, Any]:
            return faulty_registers(self.program, layer, x)

        monkeypatch.setattr(EagerModule, "registers", registers)

    return broken


class FakeOnnx(nn.Module):
    """A runtime in the place of ONNX Runtime, wrong in ways that can be chosen."""

    def __init__(self, program: IntegerProgram, flavor: str, broken: str, hidden: str, roll: int):
        super().__init__()
        self.program, self.flavor = program, flavor
        self.broken, self.hidden, self.roll = broken, hidden, roll
        self.exact = EagerModule(program, "fbgemm")

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(x).roll(self.roll, 1)

    def registers(self, x: Tensor) -> dict[str, Any]:
        values = faulty_registers(self.program, self.broken, x)
        return {name: value for name, value in values.items() if name != self.hidden}


@pytest.fixture
def fake_onnx(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it as ``fake_onnx(flavor=…, broken=…, hidden=…, roll=…)``."""

    def fake(flavor: str = "fast", broken: str = "", hidden: str = "", roll: int = 0) -> None:
        def module(artifact: Any, folder: Path, wanted: Flavor | None) -> tuple[Any, str]:
            return FakeOnnx(artifact.integers, flavor, broken, hidden, roll), "model.onnx"

        monkeypatch.setattr(verify_runtimes, "_onnx_module", module)

    return fake


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each row of a table, by the first."""
    cells = [line.split() for line in text.splitlines() if line.strip()]
    return {first: others for first, *others in cells}


# ---- the eager module --------------------------------------------------------------------------


def test_the_exact_engine(fxq: Callable, digits_run: Path) -> None:
    done = fxq("verify", str(digits_run), *EAGER)
    assert (done.code, done.err) == (0, "")
    assert "on 4 images of digits test" in done.out
    assert rows(done.out)["conv"] == ["4", "16384", "0", "0", "0", "0"]
    assert "output: 4 of 4 argmaxes agree (100.00 %), largest difference 0" in done.out
    assert "outputs against" not in done.out  # there is nothing beside the exact engine
    assert done.out.rstrip().endswith("verified: eager fbgemm")


@pytest.mark.parametrize("engine", ["x86", "onednn"])
def test_an_engine_that_differs_is_explained(engine: str, fxq: Callable, digits_run: Path) -> None:
    done = fxq("verify", str(digits_run), *EAGER, "--engine", engine)
    shown = json.loads(fxq("verify", str(digits_run), *EAGER, "--engine", engine, "--json").out)
    assert done.code == 0
    assert "nothing here must be exact" in done.out
    assert "as compiled" not in done.out
    differs = any(one["differing"] for one in shown["runtimes"][0]["layers"])
    assert (": compare with --engine fbgemm" in done.out) is differs


def test_the_engine_of_the_run_is_shown_too(fxq: Callable) -> None:
    assert fxq(*QUICK, "--engine", "x86").code == 0
    done = fxq("verify", "out", *EAGER)
    assert done.code == 0
    assert "eager x86, as compiled  16 of 16" in done.out


def test_a_broken_layer_is_named(fxq: Callable, digits_run: Path, break_eager: Callable) -> None:
    break_eager("conv2")
    done = fxq("verify", str(digits_run), *EAGER)
    table = rows(done.out)
    introduced = int(table["%conv2"][2])
    assert done.code == 2
    assert introduced > 100
    assert table["conv"][2] == str(introduced)
    assert f"eager fbgemm: {introduced} elements differ" in done.err
    assert f"%conv2 ({introduced})" in done.err
    assert "hint" in done.err
    others = {name: cells for name, cells in table.items() if name[0] == "%" and name != "%conv2"}
    assert others
    assert all(cells[2] == "0" and int(cells[3]) > 0 for cells in others.values())
    assert "verified" not in done.out


def test_how_many_layers_are_shown(fxq: Callable, digits_run: Path, break_eager: Callable) -> None:
    break_eager("conv1")
    worst = fxq("verify", str(digits_run), *EAGER, "--worst", "1")
    everything = fxq("verify", str(digits_run), *EAGER, "--all")
    assert [name for name in rows(worst.out) if name[0] == "%"] == ["%conv1"]
    assert "more layers that differ; --all shows them" in worst.out
    shown = [name for name in rows(everything.out) if name[0] == "%"]
    assert len(shown) == 10
    assert "more layers" not in everything.out


def test_json(fxq: Callable, digits_run: Path, break_eager: Callable) -> None:
    break_eager("conv2")
    done = fxq("verify", str(digits_run), *EAGER, "--json")
    found = json.loads(done.out)
    assert done.code == 2
    assert (found["images"], found["layer_images"], found["data"]) == (16, 4, "digits test")
    assert not found["passed"]
    assert len(found["problems"]) == 1
    (eager,) = found["runtimes"]
    layers = {one["name"]: one for one in eager["layers"]}
    assert [name for name, one in layers.items() if one["introduced"]] == ["conv2"]
    assert layers["conv2"]["sources"] == ["conv2", "relu2"]
    assert layers["conv2"]["elements"] >= layers["conv2"]["introduced"]
    kinds = {one["kind"]: one for one in eager["kinds"]}
    assert kinds["conv"]["introduced"] == layers["conv2"]["introduced"]
    assert found["outputs"]["against"] == "eager fbgemm"
    assert found["outputs"]["found"] == {}  # there is nothing beside the exact engine


# ---- ONNX Runtime ------------------------------------------------------------------------------


def test_the_exported_model(fxq: Callable, digits_run: Path) -> None:
    done = fxq("verify", str(digits_run), "--images", "16", "--layers-images", "2")
    assert done.code == 0, done.err
    assert "verified: eager fbgemm and onnx fast, exported for this" in done.out


def test_layers_in_float_may_round_otherwise(fxq: Callable, tmp_path: Path) -> None:
    """What is quantized per channel runs in float: no runtime must sum in the same order."""
    out = str(tmp_path / "run")
    options = ("--set", "insert-observers.per_channel=true", "--backend", "onnx", "-o", out)
    made = fxq("compile", "tiny/residual", "-r", "minmax-int8", "-c", "random", "-n", "4", *options)
    assert made.code == 0, made.err
    assert "0 of 4 convolutions and linears run on integers" in made.out + made.err
    done = fxq("verify", out, "--images", "16", "--layers-images", "4", "--all")
    assert done.code == 0, done.err
    assert "verified: eager fbgemm and onnx fast" in done.out
    assert "conv" not in rows(done.out)
    assert rows(done.out)["%x_quantizer"][:3] == ["fake_quantize", "768", "0"]


ONNX = ("--runtime", "onnx", "--images", "16", "--layers-images", "4")


@pytest.mark.parametrize(
    ("wrong", "code", "told"),
    [
        ({}, 0, "verified: onnx fast, model.onnx"),
        ({"broken": "conv2"}, 2, "%conv2 ("),
        ({"broken": "add"}, 0, "%add"),
        ({"broken": "conv2", "flavor": "compact"}, 0, "in the compact flavor"),
        ({"hidden": "flatten"}, 0, "verified"),
        ({"hidden": "conv2"}, 2, "1 layer cannot be seen, such as %conv2"),
        ({"roll": 1}, 2, "0 of 16 argmaxes agree with the reference, 0.00 % where 99.9 % must"),
        ({"roll": 1, "flavor": "compact"}, 0, "0 of 16 argmaxes agree"),
    ],
    ids=str,
)
def test_what_onnx_runtime_must(
    fxq: Callable,
    digits_run: Path,
    fake_onnx: Callable,
    wrong: dict[str, Any],
    code: int,
    told: str,
) -> None:
    fake_onnx(**wrong)
    done = fxq("verify", str(digits_run), *ONNX)
    assert done.code == code, done.err
    assert told in done.out + done.err


def test_the_deployed_file_is_the_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loads: list[dict[str, Any]] = []

    def load(integers: Any, **options: Any) -> Any:
        loads.append(options)
        return SimpleNamespace(flavor=options.get("flavor", "compact"))

    names = {"fast": "model.onnx", "compact": "model-compact.onnx"}
    backend = SimpleNamespace(load=load, file_name=names.get)
    monkeypatch.setattr(registry, "catalog", lambda wing: {"onnx": backend})
    own = SimpleNamespace(flavor="fast")
    run = SimpleNamespace(backend="onnx", module=own, integers=None)
    choose = verify_runtimes._onnx_module
    assert choose(run, tmp_path, None) == (own, "model.onnx")
    assert choose(run, tmp_path, Flavor.FAST) == (own, "model.onnx")
    assert loads == []
    assert choose(run, tmp_path, Flavor.COMPACT)[1] == "exported for this"
    run.backend = "eager"
    assert choose(run, tmp_path, None)[1] == "exported for this"
    (tmp_path / "model.onnx").touch()
    assert choose(run, tmp_path, None)[1] == "model.onnx"
    assert choose(run, tmp_path, Flavor.COMPACT)[1] == "exported for this"
    (tmp_path / "model-compact.onnx").touch()
    assert choose(run, tmp_path, Flavor.COMPACT)[1] == "model-compact.onnx"
    inside = [one for one in loads if "folder" in one]
    assert [one["flavor"] for one in inside] == ["fast", "compact"]


def test_without_onnx_runtime(
    fxq: Callable, digits_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = fxq("verify", str(digits_run))
    assert (done.code, "pip install onnx onnxruntime" in done.err) == (2, True)
    assert fxq("verify", str(digits_run), *EAGER).code == 0


def test_without_the_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "catalog", lambda wing: {})
    with pytest.raises(FxqError, match="this fxq has no onnx backend"):
        verify_runtimes._onnx_module(SimpleNamespace(backend="eager"), tmp_path, None)


# ---- data --------------------------------------------------------------------------------------


def test_random_inputs_are_said_aloud(fxq: Callable, digits_run: Path) -> None:
    assert fxq(*QUICK).code == 0
    done = fxq("verify", "out", *EAGER)
    assert (done.code, "the inputs are random" in done.err) == (0, True)
    assert "on 4 images of noise from N(0, 1)" in done.out
    done = fxq("verify", str(digits_run), *EAGER, "--data", "random")
    assert (done.code, done.err, "noise" in done.out) == (0, "", True)


def test_own_data_of_a_model_file(fxq: Callable, write: Write) -> None:
    text = write("model.py").read_text()
    assert fxq("compile", "model.py", "-r", "minmax-int8", "-o", "out").code == 0
    found = json.loads(fxq("verify", "out", *EAGER, "--data", "model.py", "--json").out)
    assert (found["data"], found["images"]) == ("eval_data of the model file", 10)
    write("model.py", text.replace("eval_data", "other"))
    found = json.loads(fxq("verify", "out", *EAGER, "--data", "model.py", "--json").out)
    assert (found["data"], found["images"]) == ("calibration_data of the model file", 12)
    write("model.py", text.replace("eval_data", "other").replace("calibration_data", "another"))
    done = fxq("verify", "out", *EAGER, "--data", "model.py")
    assert (done.code, "neither eval_data nor calibration_data" in done.err) == (2, True)


def test_images_of_the_wrong_kind(fxq: Callable, tmp_path: Path) -> None:
    assert fxq(*QUICK).code == 0
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 1, 8, 8), np.uint8), y=np.zeros(4, np.int64))
    done = fxq("verify", "out", *EAGER, "--data", "x.npz", "--mean", "0,0,0", "--std", "1,1,1")
    assert (done.code, "DataError" in done.err) == (2, True)
    done = fxq("verify", "out", *EAGER, "--data", "nothing.npz")
    assert done.code == 2


def test_inputs_that_do_not_fit(fxq: Callable, write: Write) -> None:
    text = write("model.py").read_text()
    assert fxq("compile", "model.py", "-r", "minmax-int8", "-o", "out").code == 0
    write("model.py", text.replace("randn(5, 1,", "randn(5, 2,"))
    done = fxq("verify", "out", *EAGER, "--data", "model.py")
    assert done.code == 2
    assert "the program fails on these inputs" in done.err
    assert "[4, 2, 8, 8]" in done.err


def test_no_random_numbers_for_whole_numbers(fxq: Callable, write: Write) -> None:
    write(
        "words.py",
        """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
        example_inputs = torch.zeros(2, 3, dtype=torch.int64)
        calibration_data = [torch.arange(6).reshape(2, 3)]
        """,
    )
    assert fxq("compile", "words.py", "-r", "minmax-int8", "-o", "out").code == 0
    done = fxq("verify", "out", *EAGER)
    assert (done.code, "there is nothing to compare on" in done.err) == (2, True)
    assert fxq("verify", "out", *EAGER, "--data", "words.py").code == 0


def test_inputs_are_cut_to_the_limit() -> None:
    batches = [(torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(0, 2), torch.zeros(0))]
    batches += [(torch.zeros(4, 2), torch.zeros(())), (torch.zeros(9, 2), torch.zeros(9))]
    found = list(verify_data.Inputs("x", batches, 5))
    assert [[tuple(value.shape) for value in batch] for batch in found] == [
        [(3, 2), (3,)],
        [(2, 2), ()],
    ]


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--runtime", "tensorrt"), "there is no runtime named 'tensorrt'"),
        (("--runtime", ","), "--runtime names nothing"),
        (("--runtime", "eager", "--mean", "0.5"), "--mean and --std go together"),
        (("--images", "0"), "--images"),
        (("--flavor", "tiny"), "--flavor"),
    ],
)
def test_wrong_options(
    fxq: Callable, digits_run: Path, arguments: tuple[str, ...], told: str
) -> None:
    done = fxq("verify", str(digits_run), *arguments)
    assert (done.code, told in done.err) == (2, True)


def test_a_broken_run(fxq: Callable, digits_run: Path, tmp_path: Path) -> None:
    assert "there is no such run folder" in fxq("verify", "nowhere", *EAGER).err
    for file in digits_run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    (tmp_path / "metadata.json").write_text(json.dumps(metadata | {"model": [1]}))
    seal(tmp_path)
    done = fxq("verify", ".", *EAGER)
    assert (done.code, "its metadata is damaged" in done.err) == (2, True)
    (tmp_path / "weights.safetensors").unlink()
    done = fxq("verify", ".", *EAGER)
    assert (done.code, "weights.safetensors" in done.err) == (2, True)
