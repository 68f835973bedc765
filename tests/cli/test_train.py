"""``fxq train``: from a network to a trained run, and everything that can stop it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fxq.training.loop import _Run

QUICK = ("-n", "192", "-b", "32", "--calibration-images", "64", "--eval-images", "60")


def command(*more: str) -> tuple[str, ...]:
    return (
        *("train", "digits/convnet", *QUICK, "--epochs", "2", "--augmentation", "none"),
        *("--threads", "1", "-o", "out", *more),
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, invoke: Callable) -> tuple[Path, Any]:
    """A trained run, and what was told of it; read-only."""
    folder = tmp_path_factory.mktemp("trained")
    done = invoke(*command("-o", str(folder / "out")))
    assert done.code == 0, done.err
    return folder / "out", done


def test_what_is_written(trained: tuple[Path, Any]) -> None:
    run, done = trained
    assert names(run.parent) == {"out"}
    assert names(run / "training") == {
        *("checkpoint.safetensors", "log.csv", "steps.csv", "curves.png")
    }
    with (run / "training" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert any(name.endswith("alpha mean") for name in rows[0])
    scores = json.loads((run / "metadata.json").read_text())["accuracy"]
    assert scores.keys() == {"float", "compiled", "trained"}
    assert scores["trained"]["top1"] == float(rows[-1]["test_accuracy"]) > 0.8
    assert abs(scores["trained"]["correct"] - scores["compiled"]["correct"]) <= 2
    for word in ("apot-4bit", "2 epochs", "on integers", "60 of 450 images of digits test"):
        assert word in done.out


@pytest.mark.parametrize(
    "after",
    [("eval", "--limit", "30"), ("verify",), ("bench", "--rounds", "1"), ("diff", "--stat")],
)
def test_the_run_is_an_ordinary_one(
    trained: tuple[Path, Any], fxq: Callable, after: tuple[str, ...]
) -> None:
    done = fxq(after[0], str(trained[0]), *after[1:])
    assert done.code == 0, done.err


def test_ctrl_c_and_again(
    trained: tuple[Path, Any], fxq: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = _Run._step

    def stop(self: _Run, *arguments: Any) -> None:
        step(self, *arguments)
        if self.position.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_step", stop)
        done = fxq(*command())
    told = "interrupted; the same command continues where it was, from out.partial\n"
    assert (done.code, done.err) == (130, told)
    assert names(tmp_path) == {"out.partial"}
    other = fxq(*command("--lr", "0.3"))
    assert other.code == 2
    assert "another lr (0.01, now 0.3)" in other.err
    recipe = fxq(*command("-r", "apot-2bit"))
    assert recipe.code == 2
    assert "another" in recipe.err
    again = fxq(*command())
    assert again.code == 0, again.err
    assert "continued at step 4 of 12" in again.out
    assert names(tmp_path) == {"out"}
    for name in ("weights.safetensors", "training/checkpoint.safetensors"):
        ours, theirs = (load_file(run / name) for run in (tmp_path / "out", trained[0]))
        assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)
    steps = [run / "training" / "steps.csv" for run in (tmp_path / "out", trained[0])]
    assert steps[0].read_bytes() == steps[1].read_bytes()


def test_a_divergence_keeps_the_checkpoint_and_fresh_begins_anew(
    fxq: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = _Run._step

    def spoil(self: _Run, *arguments: Any) -> None:
        if self.position.step == 8:
            for parameter in self.module.parameters():
                parameter.data.fill_(float("nan"))
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_step", spoil)
        done = fxq(*command())
    assert done.code == 2
    assert "TrainingError: the loss is nan" in done.err
    assert "epoch 2, step 3 of 6" in done.err
    assert "the last good checkpoint, of step 6, is kept" in done.err
    assert names(tmp_path) == {"out.partial"}
    again = fxq(*command("--fresh", "--epochs", "1"))
    assert again.code == 0, again.err
    assert "continued" not in again.out
    assert names(tmp_path) == {"out"}


def test_fewer_bits_begin_where_more_ended(
    trained: tuple[Path, Any], fxq: Callable, tmp_path: Path
) -> None:
    run = str(trained[0])
    done = fxq(*command("-r", "apot-2bit", "--init", run, "--epochs", "1", "--lr", "1e-9"))
    assert done.code == 0, done.err
    before, after = (
        load_file(place / "training" / "checkpoint.safetensors")
        for place in (trained[0], tmp_path / "out")
    )
    weights = [name for name in before if name.endswith("weight") and name.startswith("model.")]
    assert len(weights) > 4
    for name in weights:
        assert (before[name] - after[name]).abs().max() < 1e-6, name
    alphas = [name for name in after if name.endswith(".alpha") and name.startswith("model.")]
    assert alphas
    assert any(float(before[name]) != pytest.approx(float(after[name])) for name in alphas)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("-r", "aciq-4bit"), "aciq-4bit quantizes without training"),
        (("-r", "aciq-4bit"), "recipes that train: adaptive-fixed-point, "),
        (("--init", "nowhere"), "there is no checkpoint of a training"),
        (("--lr", "0"), "lr must be positive"),
        (("--milestones", "a"), "--milestones takes numbers"),
        (("-b", "400", "-n", "192"), "a batch of 400 is larger than the training data, which has"),
        (("--data", "nowhere.npz"), "there is no such file"),
        (("--device", "cuda"), "there is no CUDA device"),
    ],
)
def test_what_is_refused(
    fxq: Callable, tmp_path: Path, more: tuple[str, ...], told: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = fxq(*command(*more))
    assert done.code == 2
    assert told in " ".join(done.err.split())
    assert names(tmp_path) == set()


def test_a_model_file_without_data(fxq: Callable, write: Callable) -> None:
    write("model.py")
    done = fxq("train", "model.py", "--epochs", "1")
    assert done.code == 2
    assert "there is nothing to train on" in done.err


OWN_DATA = """
def train_data():
    images = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    images[torch.arange(40), 0, labels] += 3
    return torch.utils.data.TensorDataset(images, labels)
"""


def test_a_model_file_with_its_own_data(
    fxq: Callable, write: Callable, tmp_path: Path, model_file: str
) -> None:
    """Without calibration data, the first clips come from the training data, too."""
    write("model.py", model_file.replace("calibration_data", "unused") + OWN_DATA)
    done = fxq("train", "model.py", "--epochs", "2", "-b", "8", "--lr", "0.05")
    assert done.code == 0, done.err
    assert "calibrating on 40 images of the model file" in done.out
    assert "training on 40 images of the model file" in done.out
    assert names(tmp_path / "runs") == {"model-apot-4bit"}


def test_data_that_is_no_data_set(fxq: Callable, write: Callable, model_file: str) -> None:
    write("model.py", f"{model_file}\ntrain_data = (one for one in [])\n")
    done = fxq("train", "model.py")
    assert done.code == 2
    assert "train_data is a generator that is empty or has no positions" in done.err


def test_help_needs_no_torch() -> None:
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fxq.cli.main import app\n"
        "done = CliRunner().invoke(app, ['train', '--help'])\n"
        "assert done.exit_code == 0 and '--alpha-lr' in done.output\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_two_processes(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """Only the first one writes and tells."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    main = tmp_path / "main.py"
    main.write_text("from fxq.cli.main import main\nmain()\n")
    done = subprocess.run(
        [sys.executable, *torchrun, str(main), *command()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained to out") == 1
    assert done.stdout.count("training on 192 of 1347 images") == 1
    assert names(tmp_path) == {"main.py", "out"}
