"""Bad input: exit code 2, what / where / hint on standard error, no traceback, nothing written."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fxq.errors import FxqError

Write = Callable[..., Path]

COMPILE = ("compile", "model.py", "-r", "minmax-int8")
FINE = """
    import torch
    from torch import nn
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    example_inputs = torch.zeros(1, 1, 8, 8)
"""

FILES = {
    "syntax error": ("model = (\n", "SyntaxError", "model.py:1"),
    "raises": ("import torch\n\nmodel = 1 / 0\n", "ZeroDivisionError", "model.py:3"),
    "missing import": ("import no_such_thing\n", "ModuleNotFoundError", "install no_such_thing"),
    "exits": ("import sys\nsys.exit(3)\n", "sys.exit()", "__main__"),
    "empty": ("", "it defines no 'model'", "a model file defines model"),
    "other name": (
        "from torch import nn\nnet = nn.ReLU()\n",
        "it defines no 'model'",
        "model.py:net",
    ),
    "state dict": ("model = {}\n", "model is a dict", "a state dict is no network"),
    "number": ("model = 3\n", "model is an int", "not a torch.nn.Module"),
    "factory gives text": ("def model():\n    return 'x'\n", "model is a str", ""),
    "factory fails": (
        "def model():\n    raise ValueError('no weights')\n",
        "model() fails: ValueError: no weights",
        "model.py:2 in model",
    ),
    "factory needs arguments": ("def model(depth):\n    ...\n", "model() needs arguments", "depth"),
    "no example": (
        "from torch import nn\nmodel = nn.ReLU()\n",
        "it defines no 'example_inputs'",
        "--input-shape",
    ),
    "example is text": (
        "from torch import nn\nmodel = nn.ReLU()\nexample_inputs = 'x'\n",
        "example_inputs is a str",
        "",
    ),
    "calibration is a number": (
        FINE + "    calibration_data = 5\n",
        "calibration_data is an int",
        "",
    ),
    "evaluation read once": (
        FINE + "    calibration_data = [torch.zeros(1, 1, 8, 8)]\n    eval_data = iter([])\n",
        "eval_data can be read only once",
        "a function that returns the batches",
    ),
    "evaluate is a number": (FINE + "    evaluate = 1.0\n", "evaluate is a float", "a function"),
    "no calibration": (FINE, "there is no calibration data", "--calibration"),
    "empty calibration": (FINE + "    calibration_data = []\n", "0 batches", ""),
    "calibration of another shape": (
        FINE + "    calibration_data = [torch.zeros(2, 3, 8, 8)]\n",
        "calibration batch",
        "",
    ),
    "example of another shape": (
        FINE.replace("zeros(1, 1, 8, 8)", "zeros(1, 3, 8, 8)")
        + "    calibration_data = [example_inputs]\n",
        "the model fails on the example input",
        "float32[1, 3, 8, 8]",
    ),
    "not traceable": (
        """
        import torch
        from torch import nn

        class Branch(nn.Module):
            def forward(self, x):
                if x.sum() > 0:
                    return x
                return -x

        model = Branch()
        example_inputs = torch.zeros(1, 1, 8, 8)
        calibration_data = [torch.zeros(1, 1, 8, 8)]
        """,
        "CaptureError: Branch cannot be traced symbolically",
        "model.py:7 in forward: if x.sum() > 0:",
    ),
    "calibration fails": (
        FINE + "    def calibration_data():\n        yield example_inputs\n        1 / 0\n",
        "reading its batches fails: ZeroDivisionError",
        "model.py:8 in calibration_data: 1 / 0",
    ),
    "evaluation fails": (
        FINE
        + "    calibration_data = [example_inputs]\n    evaluate = lambda module: module.nothing\n",
        "evaluate() fails: AttributeError",
        "model.py:7",
    ),
    "evaluation of another shape": (
        FINE
        + "    calibration_data = [example_inputs]\n"
        + "    eval_data = [(torch.zeros(2, 3, 8, 8), torch.zeros(2))]\n",
        "the network fails on a batch of eval_data",
        "inputs of shape [2, 3, 8, 8]",
    ),
    "evaluation without labels": (
        FINE + "    calibration_data = [example_inputs]\n    eval_data = [example_inputs]\n",
        "a batch of eval_data is a Tensor",
        "yield (inputs, labels)",
    ),
    "bad measure": (
        FINE + "    calibration_data = [example_inputs]\n    evaluate = lambda module: 'good'\n",
        "evaluate() returned a str",
        "return a number",
    ),
}


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.replace(" ", "-"))
def test_model_file(fxq: Callable, write: Write, tmp_path: Path, case: str) -> None:
    text, what, where = FILES[case]
    write("model.py", text)
    done = fxq(*COMPILE)
    assert done.code == 2, done.out + done.err
    assert what in done.err
    assert where in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs").exists()


def test_calibration_that_is_not_finite(fxq: Callable, write: Write) -> None:
    write("model.py", FINE + "    calibration_data = [example_inputs / 0]\n")
    done = fxq(*COMPILE)
    assert (done.code, "CalibrationError" in done.err) == (2, True), done.err
    assert "NaN" in done.err


OPTIONS = [
    (("compile", ""), "there is no network named ''", "`fxq models`"),
    (("compile", "."), "there is no network", "a folder is no network"),
    (("compile", "nowhere.py"), "there is no such model file", "fxq models"),
    (("compile", "no.such.module:net"), "there is no module 'no'", "package.module:name"),
    (("compile", "json:net"), "it defines no 'net'", ""),
    (("compile", "cifar/resnet200"), "there is no network named", "did you mean 'cifar/resnet20'?"),
    (("compile", "torchvision/resnet5"), "no torchvision network", "did you mean"),
    (("compile", "model"), "there is no network named 'model'", "did you mean model.py?"),
    (("compile", "tiny/conv", "-r", "aciq-4bits"), "there is no recipe", "'aciq-4bit'"),
    (("compile", "tiny/conv", "-r", "my.toml"), "there is no such recipe file", "built in"),
    (("compile", "tiny/conv", "--backend", "eagre"), "there is no backend", "'eager'"),
    (("compile", "tiny/conv", "--set", "bits"), "a setting is pass.option=value", "--set bits"),
    (("compile", "tiny/conv", "--set", "foo.bits=3"), "there is no pass named 'foo'", "known:"),
    (
        ("compile", "tiny/conv", "--set", "quantize-aciq.weight_bit=3"),
        "has no option",
        "'weight_bits'",
    ),
    (("compile", "tiny/conv", "--set", "weight_bits=many"), "must be int", "'many'"),
    (("compile", "tiny/conv"), "there is no calibration data", "--calibration"),
    (("compile", "tiny/conv", "-w", "no.safetensors"), "there is no such weight file", "--weights"),
    (("compile", "tiny/conv", "-w", "model.py"), "weight files end in", ""),
    (("compile", "tiny/conv", "-c", "no.npz"), "how pixels become", "--mean"),
    (("compile", "cifar/resnet20", "-c", "no.npz"), "no such file or folder", "no.npz"),
    (("compile", "cifar/resnet20", "-c", "model.py"), "none of the image layouts", ""),
    (("compile", "cifar/resnet20", "-c", "random", "-e", "no.npz"), "no such file", "no.npz"),
    (("compile", "tiny/mlp", "-c", "no.npz"), "images need a network that takes", ""),
    (("compile", "tiny/conv", "--mean", "0.5"), "--mean and --std go together", ""),
    (("compile", "tiny/conv", "--mean", "a", "--std", "1"), "--mean takes numbers", "0.485"),
    (("compile", "tiny/conv", "--mean", "0.5", "--std", "0"), "must be positive", "--std 0"),
    (
        ("compile", "tiny/conv", "-c", "no.npz", "--mean", "0.5", "--std", "1"),
        "have 1 channels, the network takes 3",
        "",
    ),
    (("compile", "tiny/conv", "--input-shape", "1,x"), "--input-shape takes", "1,3,224,224"),
    (("compile", "tiny/conv", "--plugin", "no.py"), "there is no such plugin file", "no.py"),
    (("compile", "tiny/conv", "--plugin", "model.py"), "the plugin has no CATALOG", ""),
    (("compile", "tiny/conv", "-c", "random", "-o", "model.py"), "the output is a file", ""),
    (("compile", "tiny/conv", "-c", "random", "-o", "model.py/a"), "ArtifactError", "model.py"),
    (("diff", "nothing"), "there is no such run folder", "fxq compile writes one"),
    (("diff", "."), "this folder is no run", ""),
    (("show", "."), "this folder is no run", ""),
    (("show", "tiny/conv", "--step", "3"), "not compiled", ""),
    (("explain", "tiny/cnv"), "there is no network", "'tiny/conv'"),
    (("explain", "tiny/conv", "-r", "x"), "there is no recipe", ""),
    (("eval", "nothing"), "there is no such run folder", ""),
    (("bench", "nothing"), "there is no network named 'nothing'", ""),
    (("bench", "tiny/conv", "-r", "x"), "there is no recipe", ""),
    (("bench", "tiny/conv", "-r", "minmax-int8", "-a", "flaot"), "no such run folder", ""),
    (("passes", "mark-rleu"), "there is no pass", "'mark-relu'"),
    (("recipes", "aciq4bit"), "there is no recipe", "'aciq-4bit'"),
    (("recipes", "no.toml"), "the recipe cannot be read", "no.toml"),
    (("models", "zzz"), "there is no network", ""),
]


@pytest.mark.parametrize(("arguments", "what", "hint"), OPTIONS, ids=lambda v: " ".join(v)[:40])
def test_options(
    fxq: Callable, write: Write, tmp_path: Path, arguments: tuple[str, ...], what: str, hint: str
) -> None:
    write("model.py", "x = 1\n")
    done = fxq(*arguments)
    assert done.code == 2, done.out + done.err
    assert what in done.err
    assert hint in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("compile",),
        ("compile", "tiny/conv", "--images", "0"),
        ("compile", "tiny/conv", "--engine", "cuda"),
        ("compile", "tiny/conv", "--print", "some"),
        ("compile", "tiny/conv", "--no-such-option"),
        ("no-such-command",),
        ("bench", "tiny/conv", "--rounds", "0"),
        ("eval",),
    ],
    ids=" ".join,
)
def test_usage_errors(fxq: Callable, arguments: tuple[str, ...]) -> None:
    done = fxq(*arguments)
    assert done.code == 2
    assert "Usage" in done.err
    assert "Traceback" not in done.err


# ---- output folders ----------------------------------------------------------------------------

QUICK = ("compile", "tiny/conv", "-r", "minmax-int8", "-c", "random", "-n", "4", "-o", "out")


def test_a_folder_with_content_is_kept(fxq: Callable, write: Write) -> None:
    kept = write("out/thesis.txt", "years of work")
    done = fxq(*QUICK)
    assert (done.code, "the output folder is not empty" in done.err) == (2, True)
    done = fxq(*QUICK, "--force")
    assert (done.code, "--force replaces runs only" in done.err) == (2, True)
    assert kept.read_text() == "years of work"


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_the_current_folder_is_no_output(fxq: Callable, tmp_path: Path, output: str) -> None:
    done = fxq(*QUICK[:-1], output, "--force")
    assert (done.code, "the current folder, or holds it" in done.err) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_replaced_only_by_force(fxq: Callable, tmp_path: Path) -> None:
    assert fxq(*QUICK).code == 0
    before = (tmp_path / "out/metadata.json").stat().st_mtime_ns
    refused = fxq(*QUICK)
    assert (refused.code, "--force" in refused.err) == (2, True)
    assert (tmp_path / "out/metadata.json").stat().st_mtime_ns == before
    assert fxq(*QUICK, "--force").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_output_is_refused_before_the_work(fxq: Callable, write: Write) -> None:
    write("out/a.txt", "a")
    done = fxq("compile", "nowhere.py", "-o", "out")
    assert "the output folder is not empty" in done.err


def test_a_full_disk(fxq: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fxq.trail.journal.Journal.save", refuse)
    done = fxq(*QUICK)
    assert done.code == 2
    assert "No space left on device" in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_the_weights(fxq: Callable, tmp_path: Path) -> None:
    """With a real limit on file sizes, which fails inside the weight file's own library."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        done = fxq(*QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (done.code, "too large" in done.err) == (2, True), done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_not_writable(
    fxq: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    done = fxq(*QUICK)
    assert (done.code, "not writable" in done.err) == (2, True)


# ---- other ends --------------------------------------------------------------------------------


def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fxq.cli.listing.backends", fail)


def test_interrupted(fxq: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    ending(monkeypatch, KeyboardInterrupt())
    done = fxq("backends")
    assert (done.code, done.err) == (130, "interrupted; nothing was written\n")


def test_a_defect(fxq: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    ending(monkeypatch, ZeroDivisionError("oops"))
    done = fxq("backends")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "please report it" in done.err


def test_traceback_on_request(fxq: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    ending(monkeypatch, FxqError("no", where="here", hint="there"))
    plain, full = fxq("backends"), fxq("--traceback", "backends")
    assert (plain.code, full.code) == (2, 2)
    assert plain.err == "FxqError: no\n  where here\n  hint  there\n"
    assert "Traceback" in full.err


def test_memory(fxq: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    ending(monkeypatch, MemoryError())
    done = fxq("backends")
    assert (done.code, "--batch-size" in done.err) == (2, True)


def test_the_panel_on_a_terminal(fxq: Callable) -> None:
    done = fxq("recipes", "aciq", env={"FORCE_COLOR": "1", "COLUMNS": "80"})
    assert done.code == 2
    assert "UnknownNameError" in done.err
    assert "\x1b[31m" in done.err
    assert all(word in done.err for word in ("╭", "there is no recipe", "hint"))


def test_wrong_labels(fxq: Callable, tmp_path: Path) -> None:
    images = np.zeros((2, 1, 8, 8), np.uint8)
    np.savez(tmp_path / "labels.npz", x=images, y=np.array([3, 99]))
    done = fxq("compile", "digits/convnet", "-e", "labels.npz", "-o", "out")
    assert (done.code, "the network has 10 classes" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()
