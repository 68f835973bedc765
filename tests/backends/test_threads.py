"""One artifact served from several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

import fxq
from fxq.backends.eager import EagerModule
from fxq.models_zoo import tiny_depthwise, tiny_residual

THREADS, ROUNDS = 8, 12

pytestmark = pytest.mark.usefixtures("one_thread")


def images(seed: int) -> Tensor:
    """Batches of different sizes, so that threads are in different places."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + seed % 3, 3, 8, 8, generator=generator) * 2


@pytest.fixture(scope="module", params=["minmax-int8", "aciq-4bit"])
def artifact(request: pytest.FixtureRequest) -> Any:
    calibration = [torch.cat([images(seed) for seed in range(4)])]
    build = tiny_residual if request.param == "minmax-int8" else tiny_depthwise
    example = calibration[0][:1]
    return fxq.compile(build(), example, request.param, calibration=calibration).artifact


def serve(modules: list[Any]) -> None:
    """Every thread gets what a single one gets, each from its module, all at the same time."""
    expected = [[modules[one](images(seed)) for seed in range(4)] for one in range(THREADS)]
    start = Barrier(THREADS)

    def ask(one: int) -> list[Tensor]:
        start.wait()
        return [modules[one](images((one + turn) % 4)) for turn in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        for one, answers in enumerate(pool.map(ask, range(THREADS))):
            for turn, answer in enumerate(answers):
                assert torch.equal(answer, expected[one][(one + turn) % 4]), (one, turn)


@pytest.mark.parametrize("engine", ["fbgemm", "x86", "onednn"])
def test_eager_modules(engine: str, artifact: Any) -> None:
    serve([EagerModule(artifact.integers, engine)] * THREADS)


def test_onnx_sessions(artifact: Any) -> None:
    from fxq.backends.onnx import OnnxBackend

    serve([OnnxBackend().load(artifact.integers)] * THREADS)


def test_the_first_questions_may_come_together(artifact: Any) -> None:
    """Nothing has been prepared by a first answer."""
    from fxq.backends.onnx import OnnxBackend

    backend, start = OnnxBackend(), Barrier(THREADS)
    for fresh, usual in (
        (EagerModule(artifact.integers, "fbgemm"), EagerModule(artifact.integers, "fbgemm")),
        (backend.load(artifact.integers), backend.load(artifact.integers)),
    ):
        expected = usual(images(2))

        def ask(_: int, module: Any = fresh) -> Tensor:
            start.wait()
            answer: Tensor = module(images(2))
            return answer

        with ThreadPoolExecutor(THREADS) as pool:
            assert all(torch.equal(one, expected) for one in pool.map(ask, range(THREADS)))


def test_modules_of_different_engines_together(artifact: Any) -> None:
    """Torch has one setting of the engine for all threads."""
    before = torch.backends.quantized.engine
    made = {
        engine: EagerModule(artifact.integers, engine) for engine in ("fbgemm", "x86", "onednn")
    }
    serve([made[("fbgemm", "x86", "onednn")[one % 3]] for one in range(THREADS)])
    assert torch.backends.quantized.engine == before
