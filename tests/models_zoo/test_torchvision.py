import subprocess
import sys
import textwrap

import pytest
import torch

from fxq.errors import UnknownNameError
from fxq.models_zoo import lookup, torchvision_names
from fxq.torchvision_import import import_torchvision, nms, prepare_torchvision


def run(code: str) -> None:
    """A fresh interpreter runs the code, warnings being errors."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


SMALL = ["resnet18", "mobilenet_v2", "squeezenet1_1", "inception_v3", "googlenet", "swin_t"]
SEGMENTATION = ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"]


@pytest.mark.parametrize("name", [*SMALL, *SEGMENTATION])
def test_network_builds_and_traces(name: str) -> None:
    entry = lookup(f"torchvision/{name}")
    with torch.device("meta"):
        network = entry.build(seed=None)
        traced = torch.fx.symbolic_trace(network)
        output = traced(torch.empty(entry.input_shape))
    if name in SEGMENTATION:
        assert output["out"].shape == (1, 21, 224, 224)
    else:
        assert output.shape == (1, 1000)
    assert not network.training


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in torchvision_names() if n != "regnet_y_128gf"])
def test_every_network_traces(name: str) -> None:
    if lookup(f"torchvision/{name}").takes_list:
        pytest.skip("detectors are compiled in parts")
    device = "cpu" if name.startswith("regnet") else "meta"  # regnets draw numbers while built
    with torch.device(device):
        torch.fx.symbolic_trace(lookup(f"torchvision/{name}").build(seed=None))


def test_names_and_shapes() -> None:
    names = torchvision_names()
    assert len(names) >= 80
    assert {"resnet50", "vit_b_16", "deeplabv3_resnet50", "fcn_resnet101"} <= set(names)
    assert {"retinanet_resnet50_fpn", "ssd300_vgg16", "fasterrcnn_resnet50_fpn"} <= set(names)
    assert not {"raft_large", "quantized_resnet18"} & set(names)
    assert lookup("torchvision/inception_v3").input_shape == (1, 3, 299, 299)
    assert lookup("torchvision/resnet50").size == 224


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'resnet50'"):
        lookup("torchvision/resnet5")


def test_remedy_in_a_fresh_interpreter() -> None:
    run(
        """
        import sys
        from fxq.torchvision_import import prepare_torchvision
        first = prepare_torchvision()
        assert "torchvision" not in sys.modules
        assert prepare_torchvision() == first
        import torchvision, torch
        assert torch.ops.torchvision.nms
        torchvision.models.get_model("resnet18", weights=None)
        """
    )


def test_remedy_after_a_failed_import() -> None:
    run(
        """
        try:
            import torchvision
        except RuntimeError:
            pass
        from fxq.torchvision_import import import_torchvision
        assert import_torchvision().models
        """
    )


def test_extension_that_loads_is_left_alone() -> None:
    run(
        """
        import torch
        from torch import library
        loaded = library.Library("torchvision", "DEF")
        def load(path):
            loaded.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.ops.load_library = load
        from fxq.torchvision_import import prepare_torchvision
        assert not prepare_torchvision()
        assert not hasattr(torch.ops.torchvision, "qnms")
        """
    )


def test_without_torchvision_nothing_is_defined() -> None:
    run(
        """
        import importlib.util, torch
        importlib.util.find_spec = lambda name: None
        from fxq.torchvision_import import prepare_torchvision
        assert not prepare_torchvision()
        assert not hasattr(torch.ops.torchvision, "nms")
        """
    )


def test_detection_networks_compute() -> None:
    entry = lookup("torchvision/ssdlite320_mobilenet_v3_large")
    assert entry.normalization is None  # it is inside the network
    (image,) = example = entry.example()
    assert (image.shape, float(image.min()) >= 0) == ((3, 320, 320), True)
    with torch.no_grad():
        (found,) = entry.build()(example)
    assert found["boxes"].shape[1] == 4


def reference(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    overlap = import_torchvision().ops.box_iou(boxes, boxes)
    kept: list[int] = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if all(overlap[index, other] <= threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize("count", [0, 1, 2, 17, 60])
def test_nms_against_a_plain_loop(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, generator=generator) * 10
    boxes = torch.cat([corners, corners + torch.rand(count, 2, generator=generator) * 6], dim=1)
    scores = torch.rand(count, generator=generator).round(decimals=1)  # with ties
    assert nms(boxes, scores, 0.3).tolist() == reference(boxes, scores, 0.3)
    assert (
        import_torchvision().ops.nms(boxes, scores, 0.3).tolist()
        == nms(boxes, scores, 0.3).tolist()
    )


@pytest.mark.parametrize("count", [0, 1, 150])
def test_regions_of_a_ramp_hold_the_places_of_their_bins(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchvision = import_torchvision()
    monkeypatch.setattr(torch, "compile", None)  # it needs a C++ compiler, and minutes
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    generator = torch.Generator().manual_seed(0)
    corner = 1 + 30 * torch.rand(count, 2, generator=generator)
    extent = 4 + 20 * torch.rand(count, 2, generator=generator)
    regions = torch.cat([torch.zeros(count, 1), corner, corner + extent], 1)
    found = torchvision.ops.roi_align(ramp, regions, (2, 4), sampling_ratio=2, aligned=True)
    middles = corner[:, :1] - 0.5 + extent[:, :1] * (torch.arange(4) + 0.5) / 4
    assert torch.allclose(found[:, 0], middles[:, None].expand(count, 2, 4), atol=1e-4)


def test_operators_are_ours_only_where_needed() -> None:
    import_torchvision()
    import torchvision.extension

    assert prepare_torchvision() != torchvision.extension._has_ops()
