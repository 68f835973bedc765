"""``fxq eval``: the accuracy of a saved run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxq.errors import ArtifactError, DataError

from .options import Engine

if TYPE_CHECKING:
    from torch import nn

    from fxq.zoo_entry import Normalization

    from .load import Subject
    from .score import Evaluation


def run(
    name: str,
    data: str | None,
    *,
    limit: int | None,
    batch_size: int,
    engine: Engine | None,
    normalization: Normalization | None,
    model: str | None = None,
) -> None:
    """The accuracy of a run is measured and printed.

    Args:
        name: The run folder.
        data: What to measure on.
        limit: Only the first so many images.
        batch_size: Images at a time.
        engine: Run on this engine rather than the one it was compiled for.
        normalization: How pixels become its input, where the run does not say.
        model: The network, where the run holds parts of it.
    """
    from fxq.run_folder import holds_parts

    from .show_compile import Meter, score

    chosen = engine.value if engine else None
    if holds_parts(Path(name)):
        module, about = _parts(Path(name), model or _model_file(data), chosen)
    else:
        module, about = _whole(name, chosen)
    own = None if about.get("data") else _model_file(model)
    evaluation = _evaluation(about, data or own, limit, batch_size, normalization)
    with Meter() as meter:
        measured = evaluation.measure(module, meter)
    score(evaluation.source, str(measured))


def _whole(name: str, engine: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """The module of a run, and what the run says of its network."""
    from fxq.artifact import load

    from .trail import run_folder

    artifact = load(run_folder(name), engine)
    return artifact.module, _about(artifact.metadata, name)


def _parts(folder: Path, spec: str | None, engine: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """The network put together with its compiled parts; code of the user's runs if named only."""
    from fxq.parts.folder import load_parts
    from fxq.run_folder import json_object

    from .load import load_subject

    about = _about(json_object(folder / "metadata.json"), str(folder))
    known = str(about.get("spec", ""))
    is_ours = bool(known) and ".py" not in known and ":" not in known
    chosen = spec or (known if is_ours else None)
    if chosen is None:
        raise ArtifactError(
            "this run holds parts of a model, whose code goes with them",
            where=str(folder),
            hint=f"pass --model {known}, if that is the file you compiled",
        )
    weights = Path(str(about.get("weights", "")))
    seed = about.get("seed")
    subject = load_subject(
        chosen,
        weights=weights if weights.is_file() else None,
        seed=seed if isinstance(seed, int) else 0,
    )
    return load_parts(folder, subject.model.module, engine=engine), about


def _about(metadata: dict[str, Any], name: str) -> dict[str, Any]:
    about = metadata.get("model", {})
    if not isinstance(about, dict):
        raise ArtifactError("its metadata is damaged", where=name, hint="compile again")
    return about


def _model_file(data: str | None) -> str | None:
    """The model file among what can be measured on."""
    return data if data is not None and data.partition(":")[0].endswith(".py") else None


def _evaluation(
    about: dict[str, Any],
    data: str | None,
    limit: int | None,
    batch_size: int,
    normalization: Normalization | None,
) -> Evaluation:
    from .score import evaluation_of

    subject, chosen = subject_of(about, data, normalization)
    found = evaluation_of(subject, chosen, limit=limit, batch_size=batch_size)
    if found is None:
        spec = str(about.get("spec", ""))
        hint = "pass --data with an .npz file or a folder of images"
        if ".py" in spec:
            hint = f"pass --data {spec}, whose eval_data or evaluate is then used; or a path"
        raise DataError("there is nothing to measure with", where=spec or None, hint=hint)
    return found


def subject_of(
    about: dict[str, Any], data: str | None, normalization: Normalization | None
) -> tuple[Subject, str | None]:
    """The network of a run, and the path of its data; None where it brings data of its own.

    Args:
        about: What the run says of its network.
        data: A path or a model.py; what the run was measured on if None.
        normalization: How pixels become its input, where the run does not say.
    """
    chosen = data or about.get("data") or None
    if _model_file(chosen) is not None:
        return _from_model_file(str(chosen)), None
    subject = _described(about, normalization)
    return subject, None if chosen == subject.builtin else chosen


def _from_model_file(spec: str) -> Subject:
    from .load import load_subject

    return load_subject(spec)


def _described(about: dict[str, Any], normalization: Normalization | None) -> Subject:
    """What a run says of its network, without building it."""
    import torch
    from torch import nn

    from fxq.model_file import NamedModel
    from fxq.zoo_entry import Normalization

    from .load import Subject

    try:
        if normalization is None and about.get("mean"):
            normalization = Normalization(tuple(about["mean"]), tuple(about["std"]))
        shape = tuple(int(size) for size in about.get("input_shape") or ())
        spec = str(about.get("spec", ""))
    except (TypeError, ValueError, KeyError) as error:
        raise ArtifactError(f"its metadata is damaged: {error}", hint="compile again") from error
    model = NamedModel(
        spec,
        Path(spec).name,
        nn.Identity(),
        (torch.empty(shape, device="meta"),),
        entry=_entry(spec),
    )
    return Subject(model, str(about.get("weights", "")), normalization)


def _entry(spec: str) -> Any:
    """The zoo entry of that name; None for anything else."""
    from fxq.registry import catalog

    return catalog("models_zoo").get(spec)
