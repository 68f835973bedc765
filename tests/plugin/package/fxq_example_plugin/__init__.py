"""What a third party adds to fxq: a pass, a backend and a network, found by entry points."""

from __future__ import annotations

from fxq.zoo_entry import ZooEntry

from .prune import PruneWeights
from .reference_backend import ReferenceBackend

PASSES = (PruneWeights,)
REFERENCE = ReferenceBackend()
NETWORKS = (
    ZooEntry(
        name="example/small",
        factory="fxq_example_plugin.network:small",
        input_shape=(1, 3, 8, 8),
        summary="The plugin's own network",
    ),
)
