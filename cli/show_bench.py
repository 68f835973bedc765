"""How measurements look: a table of times, and sentences that compare."""

from __future__ import annotations

from collections.abc import Sequence

from . import show
from .bench import Timing, ratio
from .compile_time import Cost


def timings(measured: Sequence[Timing], *, shape: tuple[int, ...], rounds: int) -> None:
    """Times per batch, images per second, and how each subject compares with each peer."""
    import torch

    size = "x".join(str(side) for side in shape)
    threads = show.plural(torch.get_num_threads(), "thread")
    show.line(f"input {size}, {threads}, {rounds} interleaved rounds")
    show.columns(
        [_row(one, shape[0]) for one in measured],
        head=("", "median", "min..max", "images/s"),
    )
    peers = [one for one in measured if one.peer]
    pairs = [(one, peer) for one in measured if not one.peer for peer in peers]
    if pairs:
        show.line()
    show.lines(_sentence(one, peer) for one, peer in pairs)


def _row(one: Timing, batch: int) -> tuple[str, str, str, str]:
    low, high = 1000 * min(one.seconds), 1000 * max(one.seconds)
    return (
        one.name,
        f"{1000 * one.median:.2f} ms",
        f"{low:.2f}..{high:.2f} ms",
        f"{batch / one.median:.1f}",
    )


def _sentence(one: Timing, peer: Timing) -> str:
    found = ratio(one, peer)
    spread = f"(per round {found.low:.2f}..{found.high:.2f})"
    return f"{one.name}: {found.median:.2f}x the speed of {peer.name} {spread}"


def costs(measured: Sequence[Cost], images: int) -> None:
    """Time and memory that compilations took."""
    show.line(f"{show.plural(images, 'calibration image')}, each compilation in its own process")
    show.columns([_cost_row(one) for one in measured], head=("", "time", "peak memory", "added"))


def _cost_row(one: Cost) -> tuple[str, str, str, str]:
    times = f"{one.seconds:.2f} s"
    if len(one.each) > 1:
        times += f" ({min(one.each):.2f}..{max(one.each):.2f})"
    return (one.name, times, show.size_text(one.peak), show.size_text(one.peak - one.before))
