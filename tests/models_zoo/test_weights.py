from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fxq.errors import DataError
from fxq.models_zoo import load_weights, lookup
from fxq.models_zoo.tiny import TinyConv, tiny_conv
from fxq.models_zoo.weights import fitting_entries


def saved(state: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    source, target = tiny_conv(), TinyConv().eval()
    load_weights(target, saved(source.state_dict(), tmp_path / f"w{suffix}"))
    x = torch.ones(1, 3, 8, 8)
    assert torch.equal(source(x), target(x))


def test_wrapped_and_prefixed_checkpoint(tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in tiny_conv().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint.pth")
    target = TinyConv()
    load_weights(target, tmp_path / "checkpoint.pth")
    assert torch.equal(target.fc.weight, tiny_conv().fc.weight)


def test_batch_counters_may_be_absent(tmp_path: Path) -> None:
    state = tiny_conv().state_dict()
    without = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    load_weights(TinyConv(), saved(without, tmp_path / "old.safetensors"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such weight file") as caught:
        load_weights(TinyConv(), tmp_path / "none.safetensors")
    assert str(tmp_path / "none.safetensors") in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 5, 300, -7])
def test_truncated_file(tmp_path: Path, suffix: str, keep: int) -> None:
    path = saved(tiny_conv().state_dict(), tmp_path / f"w{suffix}")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="damaged"):
        load_weights(TinyConv(), path)


def test_other_suffix(tmp_path: Path) -> None:
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(DataError, match=r"not '\.h5'"):
        load_weights(TinyConv(), tmp_path / "w.h5")


def test_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(TinyConv(), tmp_path / "module.pt")
    with pytest.raises(DataError, match="runs no code") as caught:
        load_weights(TinyConv(), tmp_path / "module.pt")
    assert caught.value.hint == "save module.state_dict() instead of the module"


@pytest.mark.parametrize("content", [{}, [1, 2], {"conv1.weight": 3}])
def test_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(DataError, match=r"no state dict|not a tensor"):
        load_weights(TinyConv(), tmp_path / "other.pt")


def test_other_network_is_named(tmp_path: Path) -> None:
    state = lookup("cifar/resnet20-a").build().state_dict()
    path = saved(state, tmp_path / "w.safetensors")
    network = lookup("cifar/resnet20").build()
    before = network.conv1.weight.clone()
    with pytest.raises(DataError, match=r"missing \(first: ") as caught:
        load_weights(network, path)
    assert "unexpected (first: linear.bias)" in caught.value.what
    assert caught.value.hint == "they fit cifar/resnet20-a"
    assert torch.equal(network.conv1.weight, before)


def test_every_untrained_network_is_recognised() -> None:
    for name in ("cifar/resnet8", "cifar/resnet110", "imagenet/mobilenetv2"):
        with torch.device("meta"):
            assert fitting_entries(lookup(name).build(seed=None).state_dict()) == [name]


def test_wrong_shape(tmp_path: Path) -> None:
    state = {**tiny_conv().state_dict(), "fc.weight": torch.zeros(10, 8)}
    with pytest.raises(DataError, match=r"fc.weight has shape \[10, 8\], .* \[10, 16\]"):
        load_weights(TinyConv(), saved(state, tmp_path / "w.safetensors"))


def test_integers_for_floats(tmp_path: Path) -> None:
    state = {**tiny_conv().state_dict(), "fc.bias": torch.zeros(10, dtype=torch.int8)}
    with pytest.raises(DataError, match=r"fc.bias holds torch.int8"):
        load_weights(TinyConv(), saved(state, tmp_path / "w.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(tmp_path: Path, value: float) -> None:
    state = {**tiny_conv().state_dict(), "fc.bias": torch.full((10,), value)}
    with pytest.raises(DataError, match=r"fc.bias holds NaN or infinite"):
        load_weights(TinyConv(), saved(state, tmp_path / "w.safetensors"))
