"""Importing torchmetrics, which is installed only where somebody wants its measures."""

from __future__ import annotations

import importlib
from typing import Any

from fxq.errors import DataError
from fxq.torchvision_import import import_torchvision


def new_metric(home: str, name: str, *needs: str, **options: Any) -> Any:
    """A metric of torchmetrics that looks at this process only.

    Args:
        home: The module within torchmetrics.
        name: The class.
        needs: Other packages it computes with.
        options: Its arguments.

    Raises:
        DataError: torchmetrics, or a package it needs, is not installed.
    """
    try:
        import_torchvision()  # before torchmetrics, which imports it without the remedy
        for package in needs:
            importlib.import_module(package)
        kind = getattr(importlib.import_module(f"torchmetrics.{home}"), name)
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise DataError(
            f"{package} is not installed, which computes {name}", hint="pip install fxq[metrics]"
        ) from error
    # Under torchrun one process measures alone, and would wait for the others.
    return kind(sync_on_compute=False, **options)
