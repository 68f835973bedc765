"""What a backend is: it turns a program into an artifact, and says what stands in the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fxq.artifact import Artifact
    from fxq.graph.program import Program


@dataclass(frozen=True)
class Obstacle:
    """A node a backend cannot lower, and why."""

    node: str
    why: str

    def __str__(self) -> str:
        return f"%{self.node}: {self.why}"


class Backend(Protocol):
    """A way to run, or to export, a compiled program."""

    @property
    def name(self) -> str:
        """The name recipes and ``--backend`` use."""

    @property
    def summary(self) -> str:
        """One line for ``fxq backends``."""

    def obstacles(self, program: Program) -> list[Obstacle]:
        """Everything in the program this backend cannot express."""

    def lower(self, program: Program, **options: Any) -> Artifact:
        """The program as an artifact of this backend.

        Raises:
            LoweringError: It has obstacles; all of them are listed.
        """
