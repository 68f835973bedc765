"""What notebooks show of an artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxq.graph import html

if TYPE_CHECKING:
    from fxq.artifact import Artifact


def artifact_html(artifact: Artifact) -> str:
    """What an artifact is: backend, size, where the nodes went, what to know, how it was made."""
    places = ", ".join(f"{count} {place}" for place, count in artifact.ledger.counts().items())
    engine = artifact.metadata.get("engine") or artifact.metadata.get("flavor")
    facts = [
        ("backend", f"{artifact.backend}, {engine}" if engine else artifact.backend),
        ("weights", f"{artifact.size_after:,} bytes"),
        ("coverage", f"{artifact.ledger.coverage():.0%} of layers on integers; nodes: {places}"),
        *(("warning", warning) for warning in artifact.warnings),
    ]
    shown = html.table((), [(html.text(name), html.text(fact)) for name, fact in facts])
    if artifact.journal is None:
        return shown
    return shown + html.folded("passes", artifact.journal._repr_html_())
