"""``fxq export``, and ``fxq compile --backend onnx``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

Write = Callable[..., Path]

QUICK = ("compile", "tiny/residual", "-r", "aciq-4bit", "-c", "random", "-n", "8")


@pytest.fixture
def run(fxq: Callable, tmp_path: Path) -> Path:
    """A run of the eager backend, called ``out``."""
    assert fxq(*QUICK, "-o", "out").code == 0
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("flavor", "file"),
    [("fast", "model.onnx"), ("packed", "model-packed.onnx"), ("compact", "model-compact.onnx")],
)
def test_a_run_becomes_a_model_beside_it(flavor: str, file: str, fxq: Callable, run: Path) -> None:
    done = fxq("export", "out", "--flavor", flavor)
    assert done.code == 0, done.err
    assert f"exported to {Path('out') / file}" in done.out
    assert "fxq verify out" in done.out
    model = onnx.load(run / file)
    onnx.checker.check_model(model, full_check=True)
    known = {entry.key: entry.value for entry in model.metadata_props}
    assert known["fxq.flavor"] == flavor
    assert known["fxq.recipe"] == "aciq-4bit"
    assert known["fxq.network"] == "tiny/residual"
    assert fxq("verify", "out", "--flavor", flavor, "-d", "random").code == 0


def test_options_of_the_model(fxq: Callable, run: Path, tmp_path: Path) -> None:
    done = fxq("export", "out", "--opset", "23", "--static", "-o", "other/place.onnx")
    assert done.code == 0, done.err
    assert "opset 23" in done.out
    assert "batch as captured" in done.out
    model = onnx.load(tmp_path / "other" / "place.onnx")
    assert model.opset_import[0].version == 23
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_a_run_of_the_backend(fxq: Callable, tmp_path: Path) -> None:
    done = fxq(*QUICK, "--backend", "onnx", "--flavor", "packed", "-o", "out")
    assert done.code == 0, done.err
    assert "aciq-4bit on onnx, packed" in done.out
    assert (tmp_path / "out" / "model-packed.onnx").is_file()
    assert fxq("verify", "out", "-d", "random").code == 0
    assert fxq("bench", "out", "--against", "out", "--rounds", "1").code == 0
    engine = fxq("eval", "out", "--engine", "x86")
    assert engine.code == 2
    assert "the onnx backend has no engines" in engine.err


def test_what_exists_is_kept(fxq: Callable, run: Path) -> None:
    (run / "model.onnx").write_text("mine")
    done = fxq("export", "out")
    assert done.code == 2
    assert "the output file exists" in done.err
    assert "--force" in done.err
    assert (run / "model.onnx").read_text() == "mine"
    assert fxq("export", "out", "--force").code == 0
    assert onnx.load(run / "model.onnx")


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no such run": (("export", "nothing"), "there is no such run folder"),
    "opset too old": (("export", "out", "--opset", "13"), "opset 13 is too old"),
    "opset too new": (("export", "out", "--opset", "999"), "opset 999 is newer"),
    "a folder": (("export", "out", "-o", "."), "the output is a folder"),
    "below a file": (("export", "out", "-o", "out/recipe.toml/x.onnx"), "parent is a file"),
    "no exporter": (("export", "out", "--backend", "eager"), "the eager backend writes no files"),
    "no backend": (("export", "out", "--backend", "onxn"), "there is no backend named 'onxn'"),
    "an option of another backend": (
        (*QUICK, "--flavor", "fast", "-o", "other"),
        "the eager backend has no option 'flavor'",
    ),
    "an engine": (
        (*QUICK, "--backend", "onnx", "--engine", "x86", "-o", "other"),
        "no option of the onnx backend named 'engine'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_say_what_is_wrong(name: str, fxq: Callable, run: Path) -> None:
    arguments, message = BAD[name]
    before = sorted(path.name for path in run.parent.rglob("*"))
    done = fxq(*arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert sorted(path.name for path in run.parent.rglob("*")) == before


def test_options_of_the_backend_are_checked_before_the_passes_run(fxq: Callable) -> None:
    done = fxq(*QUICK, "--backend", "onnx", "--opset", "13", "-o", "out")
    assert done.code == 2
    assert "opset 13 is too old" in done.err
    assert "quantize-aciq" not in done.out
    assert not Path("out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(fxq: Callable, run: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    done = fxq("export", "out", "-o", "closed/model.onnx")
    assert done.code == 2
    assert "not writable" in done.err


def test_a_full_disk_leaves_nothing_behind(
    fxq: Callable, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    done = fxq("export", "out", "-o", "deep/model.onnx")
    assert done.code == 2
    assert "No space left on device" in done.err
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.parametrize("file", ["weights.safetensors", "structure.json"])
def test_a_damaged_run_is_refused(file: str, fxq: Callable, run: Path) -> None:
    (run / file).write_bytes((run / file).read_bytes()[:50])
    done = fxq("export", "out", "-o", "model.onnx")
    assert done.code == 2
    assert file in done.err
    assert not Path("model.onnx").exists()


def test_code_of_the_users_own_that_has_no_onnx_form_is_listed(
    fxq: Callable, write: Write, tmp_path: Path
) -> None:
    write(
        "net.py",
        """
        import torch
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(1, 4, 3)

            def forward(self, x):
                y = self.conv(x)
                return torch.kthvalue(y.flatten(1), 2)[0]

        model = Net()
        example_inputs = torch.zeros(1, 1, 8, 8)
        calibration_data = [torch.randn(4, 1, 8, 8)]
        """,
    )
    done = fxq("compile", "net.py", "-r", "minmax-int8", "--backend", "onnx", "-o", "out")
    assert done.code == 2
    assert "the onnx backend cannot express" in done.err
    assert "kthvalue" in done.err
    assert not (tmp_path / "out").exists()


def test_bench_against_onnx_runtime(fxq: Callable) -> None:
    done = fxq(
        *("bench", "tiny/residual", "-r", "minmax-int8", "--backend", "eager,onnx"),
        *("--against", "onnxruntime", "--rounds", "1", "-n", "8"),
    )
    assert done.code == 0, done.err
    for name in ("minmax-int8 on eager", "minmax-int8 on onnx"):
        assert f"{name}: " in done.out
    assert "x the speed of onnxruntime" in done.out
    wrong = fxq("bench", "tiny/residual", "--backend", "onxn", "--rounds", "1")
    assert wrong.code == 2
    assert "there is no backend named 'onxn'" in wrong.err
