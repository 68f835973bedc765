"""What the folders of a data set give away: whether its images have labels, masks or boxes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from .coco_folder import is_coco
from .voc_folder import voc_roots

Task = Literal["classification", "segmentation", "detection"]


def task_of(path: str | os.PathLike[str]) -> Task:
    """What the images at a path are for.

    ``"segmentation"`` in the folders of PASCAL VOC, ``"detection"`` in those of COCO, and
    ``"classification"`` everywhere else, where ``open_images`` then says what it reads.
    """
    place = Path(path)
    if is_coco(place):
        return "detection"
    return "segmentation" if voc_roots(place) else "classification"
