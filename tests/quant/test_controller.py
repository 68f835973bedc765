"""`Controller`: what it decides, remembers, and shares with other processes."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxq.errors import TrainingError
from fxq.numerics.adaptive import FLOAT_BITS, AdaptationOptions, Mode
from fxq.numerics.fixed_point import fixed_point, resolution_exponent
from fxq.quant.controller import Controller

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = pytest.mark.parametrize("mode", list(Mode))
THRESHOLD = 0.03


def gaussian(step: int) -> Tensor:
    """Values whose range grows and shrinks over the steps."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(400, generator=generator) * math.exp(math.sin(step / 3))


def heavy(step: int = 0) -> Tensor:
    """Values of which 8 bits lose most: many small ones and one large."""
    x = gaussian(step)
    x[0] = 1000.0
    return x


def mixed(step: int) -> Tensor:
    return heavy(step) if step % 7 == 3 else gaussian(step)


def error_bits(x: Tensor, bits: int) -> float:
    """Eq. 2, from its definition."""
    exact = x.double().abs()
    exponent = resolution_exponent(float(exact.max()), bits)
    rounded = fixed_point(x.double(), exponent, bits).abs()
    return math.log2(float((exact.sum() - rounded.sum()).abs() / exact.sum()) + 1)


# ---- decisions -------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [gaussian(0), heavy(), torch.linspace(-1, 1, 99), 1e-6 * heavy()])
@pytest.mark.parametrize("start", [4, 8, 16])
def test_the_first_width_that_rounds_well_enough(x: Tensor, start: int) -> None:
    controller = Controller(AdaptationOptions(start_bits=start))
    wanted = [bits for bits in (4, 8, 16, 24) if bits >= start and error_bits(x, bits) <= THRESHOLD]
    bits, exponent = controller.choose(x)
    assert bits == wanted[0]
    assert exponent == resolution_exponent(float(x.abs().max()), bits)


def test_the_cases_above_differ() -> None:
    assert error_bits(gaussian(0), 8) < THRESHOLD < error_bits(gaussian(0), 4)
    assert error_bits(heavy(), 16) < THRESHOLD < error_bits(heavy(), 8)


def test_float_where_no_width_is_enough() -> None:
    controller = Controller(AdaptationOptions(top_bits=8))
    assert controller.choose(heavy())[0] == FLOAT_BITS


def test_a_static_width_follows_the_range_only() -> None:
    controller = Controller(AdaptationOptions.static(8))
    found = [controller.choose(heavy() * 4.0**step) for step in range(3)]
    assert found == [(8, 3), (8, 5), (8, 7)]


@MODES
def test_widths_shrink_again_in_mode1_only(mode: Mode) -> None:
    controller = Controller(AdaptationOptions(mode=mode, initial_steps=9))
    assert controller.choose(heavy())[0] == 16
    assert controller.choose(gaussian(1))[0] == (8 if mode == Mode.RECURSIVE else 16)


def test_a_mask_hides_values() -> None:
    mask = torch.ones(400)
    mask[0] = 0
    masked, plain = (Controller(AdaptationOptions()) for _ in range(2))
    kept = heavy()
    kept[0] = 0
    assert masked.choose(heavy(), mask) == plain.choose(kept)
    assert masked.adaptation().bits == 8


def test_a_value_that_would_be_clipped_makes_a_step_choose() -> None:
    controller = Controller(AdaptationOptions())
    for _ in range(3):
        controller.choose(torch.linspace(-1, 1, 1001))
    before = controller.adaptation()
    assert before.step < before.next_step
    bits, exponent = controller.choose(torch.linspace(-9, 9, 1001))
    assert (bits, exponent) == (8, resolution_exponent(9.0, 8))
    assert controller.adaptation().adjustments == before.adjustments + 1


def test_first_steps_all_choose_anew() -> None:
    controller = Controller(AdaptationOptions())
    controller.begin(6)
    for step in range(6):
        controller.choose(gaussian(0))
        assert controller.adaptation().adjustments == step + 1
    for _ in range(20):
        controller.choose(gaussian(0))
    assert controller.adaptation().adjustments < 10
    assert controller.adaptation().step == 26


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_values_that_are_no_numbers(bad: float, mode: str) -> None:
    controller = Controller(AdaptationOptions()).train(mode == "train")
    x = gaussian(0)
    x[7] = bad
    with pytest.raises(TrainingError, match="NaN or infinite"):
        controller.choose(x)
    assert controller.adaptation().step == 0


@pytest.mark.parametrize("x", [torch.zeros(9), torch.empty(0), torch.full((9,), 1e-44)])
def test_tensors_that_teach_nothing(x: Tensor) -> None:
    controller = Controller(AdaptationOptions())
    for _ in range(3):
        bits, _ = controller.choose(x)
        assert bits == 8
    assert controller.choose(gaussian(0)) == Controller(AdaptationOptions()).choose(gaussian(0))


# ---- eval ------------------------------------------------------------------------------------


def test_eval_learns_nothing() -> None:
    controller = Controller(AdaptationOptions())
    chosen = controller.choose(gaussian(0))
    before = controller.state.clone()
    controller.eval()
    assert [controller.choose(x) for x in (heavy(), gaussian(1) * 99)] == [chosen] * 2
    assert torch.equal(controller.state, before)


def test_eval_before_any_step_chooses_for_each_tensor() -> None:
    controller = Controller(AdaptationOptions()).eval()
    before = controller.state.clone()
    for x in (heavy(), gaussian(0), gaussian(0) * 64):
        assert controller.choose(x) == Controller(AdaptationOptions()).choose(x)
    assert torch.equal(controller.state, before)


# ---- what is remembered ----------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("at", [0, 1, 2, 9, 20])
def test_a_saved_state_decides_as_if_nothing_had_happened(at: int, mode: Mode) -> None:
    options = AdaptationOptions(mode=mode, initial_steps=3)
    whole, first = Controller(options), Controller(options)
    wanted = [whole.choose(mixed(step)) for step in range(30)]
    assert len(set(wanted)) > 2
    assert whole.adaptation().adjustments < 30
    for step in range(at):
        first.choose(mixed(step))
    saved = copy.deepcopy(first.state_dict())
    assert all(bool(value.isfinite().all()) for value in saved.values())
    second = Controller(options)
    second.load_state_dict(saved)
    assert second.adaptation() == first.adaptation()
    assert [second.choose(mixed(step)) for step in range(at, 30)] == wanted[at:]
    assert torch.equal(second.state, whole.state)


def test_its_listing() -> None:
    controller = Controller(AdaptationOptions())
    controller.choose(torch.ones(4))
    assert repr(controller) == "Controller(8 bits of 2**-6, chosen 1 times)"


# ---- several processes -----------------------------------------------------------------------

SCRIPT = """
import json, sys, torch
import torch.distributed as dist
from fxq.errors import TrainingError
from fxq.numerics.adaptive import AdaptationOptions
from fxq.quant.controller import Controller
torch.set_num_threads(1)
rank, count, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if count > 1:
    store = dist.FileStore(folder + "/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
controller, told = Controller(AdaptationOptions()), []
for step in range(25):
    x = torch.randn(400, generator=torch.Generator().manual_seed(step)) * (1 + step % 5)
    if step > 15:
        x[-1] = 3000.0  # in the last share only
    controller.choose(x.chunk(count)[rank])
    told.append(controller.state.tolist())
controller.eval()
told.append([float(n) for n in controller.choose(torch.ones(rank + 1))])  # nobody need wait
controller.train()
controller.state[4] = 0
x = torch.ones(400)
x[-1] = float("nan")
try:
    controller.choose(x.chunk(count)[rank])
except TrainingError as error:
    told.append(str(error))
with open(f"{folder}/{count}-{rank}.json", "w") as file:
    json.dump(told, file)
if count > 1:
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def decisions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By process: the state after every step, an answer in eval mode, and an error."""
    folder = tmp_path_factory.mktemp("world")
    who = [(0, 1), (0, 2), (1, 2)]
    commands = [[sys.executable, "-c", SCRIPT, str(r), str(n), str(folder)] for r, n in who[1:]]
    running = [subprocess.Popen(one, stderr=subprocess.PIPE, text=True) for one in commands]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", "0", "1", str(folder)])
        exec(SCRIPT, {})
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return {f"{n}-{r}": json.loads((Path(folder) / f"{n}-{r}.json").read_text()) for r, n in who}


def test_processes_with_shares_decide_as_one_with_all(decisions: dict[str, list[Any]]) -> None:
    alone, first, second = decisions["1-0"], decisions["2-0"], decisions["2-1"]
    assert first == second
    assert {state[0] for state in alone[:25]} == {8, 16}
    for one, other in zip(alone[:26], first[:26], strict=True):
        assert other == pytest.approx(one, rel=1e-9, abs=1e-12)


def test_all_stop_at_values_of_one(decisions: dict[str, list[Any]]) -> None:
    assert all("NaN or infinite" in told[26] for told in decisions.values())
