"""How a comparison with the reference looks: a row per kind of layer, and the ones that differ."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import show
from .verify import worst_first

if TYPE_CHECKING:
    from fxq.integer.comparison import Comparison
    from fxq.integer.differences import Agreement, Layer, Summary

    from .verify import Report
    from .verify_runtimes import Runtime

HEAD = ("layers", "elements", "introduced", "inherited", "differing", "largest", "nodes")


def report(found: Report, *, everything: bool, worst: int) -> None:
    """A table per runtime, then how the outputs compare, then what follows from it."""
    images = show.plural(found.layer_images, "image")
    show.line(f"{found.run}: layers against the integer reference, on {images} of {found.source}")
    for runtime, comparison in found.layers:
        show.line()
        _layers(runtime, comparison, everything=everything, worst=worst)
    if found.outputs:
        show.line()
        images = show.plural(found.images, "image")
        show.line(f"outputs against {found.stand_in}, on {images} of {found.source}")
        show.columns([(name, *_agreement(one)) for name, one in found.outputs.items()])
    if not found.problems:
        show.line()
        show.line(_passed(found))


def _layers(runtime: Runtime, comparison: Comparison, *, everything: bool, worst: int) -> None:
    from fxq.integer.differences import summaries

    layers = list(comparison.layers.values())
    rows = [_kind_row(one) for one in summaries(layers)]
    differing = worst_first(one for one in layers if one.differing or one.introduced)
    shown = layers if everything else differing[:worst]
    rows += [_layer_row(one) for one in shown]
    show.columns(rows, head=(runtime.name, *HEAD))
    if not everything and len(differing) > worst:
        show.line(f"and {len(differing) - worst} more layers that differ; --all shows them")
    show.line(f"output: {', '.join(_agreement(comparison.output))}")
    if runtime.remark and differing:
        show.line(runtime.remark)


def _kind_row(one: Summary) -> tuple[str, ...]:
    count = f"{one.layers}" if one.seen == one.layers else f"{one.seen} seen of {one.layers}"
    numbers = (one.elements, one.introduced, one.inherited, one.differing)
    parts = [_codes(one.largest)] if one.largest or not one.relative else []
    parts += [_share(one.relative)] if one.relative else []
    return (one.kind.value, count, *(str(number) for number in numbers), ", ".join(parts), "")


def _layer_row(one: Layer) -> tuple[str, ...]:
    nodes = ", ".join(one.sources)
    if not one.seen:
        return (f"  %{one.name}", "not seen", "", "", "", "", "", nodes)
    numbers = (one.elements, one.introduced, one.inherited, one.differing)
    largest = _codes(one.largest) if one.quantized else _share(one.relative)
    return (f"  %{one.name}", one.op, *(str(number) for number in numbers), largest, nodes)


def _codes(difference: float) -> str:
    return show.plural(int(difference), "code") if difference else "0"


def _share(relative: float) -> str:
    """A difference in units of the largest element."""
    return f"{relative:.1e} of max" if relative else "0"


def _agreement(one: Agreement) -> tuple[str, str]:
    largest = f"largest difference {one.largest:.3g}"
    if one.largest:
        largest += f" ({_share(one.relative)})"
    if one.share is None:
        return ("no argmax to compare", largest)
    decided = f"{one.agreeing} of {one.decisions} argmaxes agree ({100 * one.share:.2f} %)"
    return (decided, largest)


def _passed(found: Report) -> str:
    checked = [one.name for one, _ in found.layers if one.exact]
    if not checked:
        return "nothing here must be exact; compare with --engine fbgemm, or --flavor fast"
    return f"verified: {' and '.join(checked)}"


def as_json(found: Report) -> None:
    """Everything that was counted, for other programs."""
    data = {
        "run": found.run,
        "data": found.source,
        "layer_images": found.layer_images,
        "images": found.images,
        "runtimes": [_runtime_json(*one) for one in found.layers],
        "outputs": {
            "against": found.stand_in,
            "found": {name: one.to_json() for name, one in found.outputs.items()},
        },
        "passed": not found.problems,
        "problems": found.problems,
    }
    show.raw(json.dumps(data, indent=1, allow_nan=False))


def _runtime_json(runtime: Runtime, comparison: Comparison) -> dict[str, object]:
    from fxq.integer.differences import summaries

    layers: Iterable[Layer] = comparison.layers.values()
    return {
        "name": runtime.name,
        "exact": sorted(runtime.exact),
        "layers": [one.to_json() for one in layers],
        "kinds": [one.to_json() for one in summaries(layers)],
        "output": comparison.output.to_json(),
    }
