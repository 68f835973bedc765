"""The page: one HTML file with its style, its script and its data inside, and nothing outside."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from string import Template

from fxq.errors import ArtifactError
from fxq.report.data import Run, page_data, read_run

SCRIPTS = ("model.js", "charts.js", "graph.js", "panels.js", "app.js")
FILE = "report.html"


def write(run: str | Path, path: str | Path | None = None, *, force: bool = False) -> Path:
    """The report of a run folder is a file.

    Args:
        run: The folder that was compiled to.
        path: The file; ``report.html`` in the folder if not given.
        force: Whether an existing file is replaced.

    Returns:
        Where it is.

    Raises:
        ArtifactError: The folder is no run or is damaged, the file exists and force is off, or it
            cannot be written.
    """
    folder = Path(run)
    target = folder / FILE if path is None else Path(path)
    if target.exists() and not (force and target.is_file()):
        raise ArtifactError(
            "the report would replace something",
            where=str(target),
            hint="pass --force to replace it, or choose another file with -o",
        )
    text = page(read_run(folder))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            f"the report cannot be written: {error.strerror or error}", where=str(target)
        ) from error
    return target


def page(run: Run) -> str:
    """The page of a run, as HTML."""
    data = page_data(run)
    script = "\n".join(_asset(name) for name in SCRIPTS)
    about = run.metadata.get("model")
    network = about.get("spec") if isinstance(about, dict) else None
    return Template(_asset("page.html")).substitute(
        title=html.escape(str(network or run.name)),
        style=_asset("page.css"),
        script=f'"use strict";\n(() => {{\n{script}\n}})();',
        data=embedded(data),
    )


def embedded(data: object) -> str:
    r"""JSON that no HTML parser takes for anything else, whatever the names in it.

    Example:
        >>> embedded({"node": "</script><!--"})
        '{"node":"\\u003c/script\\u003e\\u003c!--"}'
    """
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (files("fxq.report") / "assets" / name).read_text(encoding="utf-8")
