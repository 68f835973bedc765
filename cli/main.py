"""The ``fxq`` command. Heavy imports happen inside the commands: ``fxq --help`` needs no torch."""

from __future__ import annotations

import contextlib
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from . import options as opt
from .ablate_command import ablate_command
from .analyze_command import analyze_command
from .backward_command import backward_command
from .bisect_command import bisect_command
from .cost_command import cost_command
from .diff_command import diff_command
from .examples import epilog
from .export_command import export_command
from .guard import INTERRUPTED, Guarded
from .import_command import import_command
from .max_drop import MaxDrop
from .replay_command import replay_command
from .report_command import report_command
from .train_command import train_command
from .verify_command import verify_command

app = typer.Typer(
    cls=Guarded,
    name="fxq",
    help="A graph-rewriting model compiler on torch.fx that quantizes neural networks.",
    epilog=epilog(""),
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """The ``fxq`` command line."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app()
    except KeyboardInterrupt:  # before a command began, or while it ended
        raise SystemExit(INTERRUPTED) from None


def _version(asked: bool) -> None:
    if asked:
        from . import show

        show.line(
            f"fxq {version('fxq')}, torch {version('torch')}, Python {sys.version.split()[0]}"
        )
        raise typer.Exit()


@app.callback()
def _fxq(
    context: typer.Context,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show every frame of an error")
    ] = False,
    _: Annotated[
        bool,
        typer.Option("--version", help="Show the version", is_eager=True, callback=_version),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        from . import show

        show.raw(context.get_help())
        raise typer.Exit()


@app.command("compile", epilog=epilog("compile"))
def compile_command(
    model: opt.Model,
    recipe: opt.Recipe = "aciq-4bit",
    settings: opt.Settings = None,
    backend: opt.Backend = "eager",
    engine: opt.EngineOption = None,
    flavor: opt.FlavorOption = None,
    opset: opt.Opset = None,
    accept_coverage: opt.AcceptCoverage = False,
    max_drop: MaxDrop = None,
    weights: opt.Weights = None,
    input_shape: opt.InputShape = None,
    leaf: opt.Leaf = None,
    plugin: opt.Plugin = None,
    calibration: opt.Calibration = None,
    images: opt.Images = None,
    evaluation: opt.Eval = None,
    eval_images: opt.EvalImages = None,
    batch_size: opt.BatchSize = 64,
    mean: opt.Mean = None,
    std: opt.Std = None,
    seed: opt.Seed = 0,
    output: opt.Output = None,
    force: opt.Force = False,
    fresh: opt.Fresh = False,
    printing: opt.Printing = None,
    verbose: opt.Verbose = False,
    threads: opt.Threads = None,
) -> None:
    """Quantize a network and write it, with the record of every pass, to a run folder.

    Under `torchrun --nproc-per-node 2 --no-python fxq compile …`, processes share the calibration.
    """
    from . import compile as work
    from . import processes
    from .load import load_plugins, set_threads

    load_plugins(plugin)
    set_threads(threads)
    job = work.Job(
        model=model,
        recipe=recipe,
        weights=weights,
        calibration=calibration,
        images=images,
        evaluation=evaluation,
        eval_images=eval_images,
        settings=settings or [],
        backend=backend,
        options=work.backend_options(engine, flavor, opset),
        output=output,
        force=force,
        fresh=fresh,
        batch_size=batch_size,
        seed=seed,
        leaves=leaf or [],
        printing=printing or (opt.Print.CHANGED if verbose else opt.Print.NONE),
        normalization=opt.normalization(mean, std),
        input_shape=opt.shape(input_shape),
        accept_coverage=accept_coverage,
        max_drop=max_drop,
    )
    processes.run(job)


app.command("diff", epilog=epilog("diff"))(diff_command)


@app.command("show", epilog=epilog("show"))
def show_command(
    name: opt.RunOrModel,
    step: Annotated[
        str | None,
        typer.Option(
            "--step",
            metavar="NAME|N",
            show_default=False,
            help="After this pass; `capture` or 0 is the graph before all; the last if not given",
        ),
    ] = None,
    digests: Annotated[bool, typer.Option(help="Whether weights are shown as digests")] = True,
    input_shape: opt.InputShape = None,
    plugin: opt.Plugin = None,
) -> None:
    """Show the graph of a run after a pass, or the captured graph of a network."""
    from . import trail
    from .load import load_plugins

    load_plugins(plugin)
    trail.show_graph(name, step, digests, opt.shape(input_shape))


@app.command("explain", epilog=epilog("explain"))
def explain_command(
    name: opt.RunOrModel,
    only: opt.PassName = None,
    node: Annotated[
        str | None,
        typer.Option(
            "--node", metavar="GLOB", show_default=False, help="Only nodes whose name matches"
        ),
    ] = None,
    recipe: opt.Recipe = "aciq-4bit",
    input_shape: opt.InputShape = None,
    plugin: opt.Plugin = None,
) -> None:
    """Explain what each pass refused, and why nodes stayed in float.

    For a network rather than a run, the passes of the recipe that need no data are asked.
    """
    from . import trail
    from .load import load_plugins

    load_plugins(plugin)
    trail.explain(name, only, node, recipe, opt.shape(input_shape))


@app.command("eval", epilog=epilog("eval"))
def eval_command(
    run: opt.Run,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            metavar="DATA",
            show_default=False,
            help="Images to measure on, or a model.py with eval_data or evaluate; "
            "what the run was measured on if not given",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, show_default=False, help="Only the first so many images"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="The network that only parts of were compiled"
        ),
    ] = None,
    batch_size: opt.BatchSize = 64,
    engine: opt.EngineOption = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    threads: opt.Threads = None,
) -> None:
    """Measure the accuracy of a run."""
    from . import evaluate
    from .load import set_threads

    set_threads(threads)
    evaluate.run(
        run,
        data,
        limit=limit,
        batch_size=batch_size,
        engine=engine,
        normalization=opt.normalization(mean, std),
        model=model,
    )


app.command("ablate", epilog=epilog("ablate"))(ablate_command)
app.command("analyze", epilog=epilog("analyze"))(analyze_command)
app.command("bisect", epilog=epilog("bisect"))(bisect_command)
app.command("cost", epilog=epilog("cost"))(cost_command)
app.command("train", epilog=epilog("train"))(train_command)
app.command("backward", epilog=epilog("backward"))(backward_command)
app.command("import", epilog=epilog("import"))(import_command)
app.command("export", epilog=epilog("export"))(export_command)
app.command("replay", epilog=epilog("replay"))(replay_command)
app.command("report", epilog=epilog("report"))(report_command)
app.command("verify", epilog=epilog("verify"))(verify_command)


@app.command("bench", epilog=epilog("bench"))
def bench_command(
    name: opt.RunOrModel,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="NAME,…", help="Recipes to compile MODEL with")
    ] = "aciq-4bit",
    against: Annotated[
        str,
        typer.Option(
            "--against",
            "-a",
            metavar="NAME,…",
            help="What to compare with: `float`, `torch.ao`, `onnxruntime` or other runs",
        ),
    ] = "float",
    backend: Annotated[
        str, typer.Option("--backend", metavar="NAME,…", help="Backends to compile MODEL for")
    ] = "eager",
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images per batch")] = 8,
    threads: opt.Threads = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            min=1,
            show_default=False,
            help="Rounds: 15 if not given, 3 with --compile-time",
        ),
    ] = None,
    engine: opt.EngineOption = None,
    weights: opt.Weights = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            metavar="DATA",
            show_default=False,
            help="What MODEL is calibrated on: its own data, or `random`, if not given",
        ),
    ] = None,
    images: Annotated[
        int, typer.Option("--images", "-n", min=1, help="Images to calibrate on")
    ] = 32,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            show_default=False,
            help="The float network of RUN, where it is in a file of yours",
        ),
    ] = None,
    input_shape: opt.InputShape = None,
    compile_time: Annotated[
        bool, typer.Option("--compile-time", help="Compare time and memory of compiling instead")
    ] = False,
    seed: opt.Seed = 0,
    plugin: opt.Plugin = None,
) -> None:
    """Time networks side by side, in interleaved rounds: runs, recipes, float and peers."""
    from . import bench
    from . import compile_time as compiling

    request = bench.Request(
        name=name,
        recipes=opt.names(recipe),
        against=opt.names(against),
        backends=opt.names(backend),
        batch=batch,
        threads=threads,
        rounds=rounds or (3 if compile_time else 15),
        engine=engine,
        weights=weights,
        input_shape=opt.shape(input_shape),
        calibration=calibration,
        images=images,
        model=model,
        seed=seed,
        plugins=plugin or [],
    )
    (compiling if compile_time else bench).run(request)


@app.command("passes", epilog=epilog("passes"))
def passes_command(
    name: Annotated[
        str | None, typer.Argument(show_default=False, help="Show the options of this pass")
    ] = None,
    plugin: opt.Plugin = None,
) -> None:
    """List the passes, or show the options of one."""
    from . import listing
    from .load import load_plugins

    load_plugins(plugin)
    listing.passes(name)


@app.command("recipes", epilog=epilog("recipes"))
def recipes_command(
    name: Annotated[
        str | None, typer.Argument(show_default=False, help="Print this recipe as TOML")
    ] = None,
) -> None:
    """List the built-in recipes, or print one as TOML."""
    from . import listing

    listing.recipes(name)


@app.command("backends", epilog=epilog("backends"))
def backends_command(plugin: opt.Plugin = None) -> None:
    """List the backends."""
    from . import listing
    from .load import load_plugins

    load_plugins(plugin)
    listing.backends()


@app.command("models", epilog=epilog("models"))
def models_command(
    pattern: Annotated[
        str | None,
        typer.Argument(
            show_default=False, help="Only names that contain this, or match it as a glob"
        ),
    ] = None,
    plugin: opt.Plugin = None,
) -> None:
    """List the networks that are known by name."""
    from . import listing
    from .load import load_plugins

    load_plugins(plugin)
    listing.models(pattern)
