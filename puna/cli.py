"""The command line: parse, call, print. Every command imports what it needs when it is called."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from puna.core.errors import PunaError
from puna.options import Companions, Device, Dtype, Kernels, Quantized, named_paths
from puna.options import parse_settings as _settings
from puna.options import show as _print
from puna.pools import data_app
from puna.serve.verbs import serve, ui

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    name="puna",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Adapts Llama-family language models, and proves what was gained and what it cost.",
)
assets_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Models and texts that puna can fetch."
)
app.add_typer(assets_app, name="assets")
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="NAME|RECIPE.yaml", help="A system, a recipe, a run folder.")
]
Scale = Annotated[str | None, typer.Option(metavar="demo|paper", help="Size of the run; demo by default.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; runs/NAME by default.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Change a setting; VALUE as in YAML. Repeatable."),
]
Seed = Annotated[int | None, typer.Option(help="Every random draw derives from it.")]


@app.command()
def run(
    recipe: RecipeArgument,
    scale: Scale = None,
    out: Out = None,
    settings: Settings = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    from_stage: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Run again from here.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run and why.")] = False,
) -> None:
    """Run a recipe, or what of it is not done yet."""
    from puna.run.look import closing, preview_table
    from puna.run.recipe import load
    from puna.run.runner import Runner, default_folder

    resolved = load(recipe, scale, _settings(settings), seed=seed, device=device, dtype=dtype)
    runner = Runner(resolved, default_folder(recipe, resolved, out), from_stage=from_stage)
    if dry_run:
        _print(preview_table(runner.preview(), runner.folder))
        return
    _print(*closing(runner.run()))


@app.command()
def prove(
    recipe: Annotated[str | None, typer.Argument(metavar="NAME|RECIPE.yaml", help="What to prove.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every system, each below --out.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs for claims that ask for several.")] = None,
    out: Out = None,
    settings: Settings = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Run at demo scale and judge the claims; 1 if one fails."""
    from puna.run.look import closing
    from puna.run.prove import prove as judge
    from puna.run.prove_all import Proofs
    from puna.run.record import Run

    if (recipe is None) != all_:
        raise PunaError("say what to prove", expected="one recipe or system, or --all")
    asked: dict[str, Any] = {"seeds": seeds, "set": _settings(settings), "device": device, "dtype": dtype}
    if recipe is None:
        proofs = Proofs(out or Path("runs"), **asked)
        found = proofs.run()
        _print(found.table(), f"table: {proofs.page}")
        failed = [f"{row.name}: {', '.join(row.failures)}" for row in found.rows if row.went_wrong]
    else:
        judged, folder = judge(recipe, out, **asked)
        _print(*closing(Run.open(folder)))
        failed = [f"{recipe}: {claim.name}" for claim in judged if not claim.passed]
    if failed:
        _print(f"failed: {'; '.join(failed)}")
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: RecipeArgument,
    scale: Scale = None,
    device: Annotated[
        str, typer.Option(help="this (measured), a100, h100, l40s, rtx4090, cpu:laptop.")
    ] = "this",
    model: Annotated[
        str | None, typer.Option(help="A model or shape (llama-2-7b) in place of the recipe's.")
    ] = None,
    settings: Settings = None,
    dtype: Dtype = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of an hour on the device.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine again.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes of torchrun, a device each.")] = 1,
) -> None:
    """Predict tokens, operations, memory and time; no download.

    Nothing runs and nothing is fetched: shapes are enough.
    """
    from puna.run.planner import plan as predict
    from puna.run.planner import size

    made = predict(
        recipe,
        scale,
        device=device,
        model=model,
        set=_settings(settings),
        dtype=dtype,
        measure_again=measure,
        processes=processes,
    )
    _print(made.table())
    _print("Assumed:", *(f"- {line}" for line in made.assumptions))
    if price is not None:
        _print(f"cost at {price:g} an hour: {made.seconds / 3600 * price * processes:.2f}")
    if not made.fits:
        _print(f"does not fit: {size(made.memory)} of {size(made.device.memory)}")


@app.command()
def systems(
    name: Annotated[str | None, typer.Argument(help="One system in detail.")] = None,
) -> None:
    """List the published systems that come as recipes."""
    from puna.run.look import system_details, systems_table
    from puna.run.systems import all_systems, describe

    if name is None:
        _print(systems_table(all_systems()))
    else:
        _print(*system_details(describe(name)))


@app.command()
def stage(
    verb: Annotated[str, typer.Argument(metavar="VERB", help="The stage, such as train.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Its parameters.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--in", metavar="[NAME=]REFERENCE", help="An input. Repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for outputs and stage.json.")
    ] = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Annotated[bool, typer.Option("--force", help="Run even if nothing changed.")] = False,
) -> None:
    """Run one stage alone.

    Without --out: tell what the stage takes and leaves.
    """
    from puna.run.alone import parse_inputs, run_stage

    if out is None:
        from puna.run.docs import stage_page

        _print(stage_page(verb))
        return
    given = parse_inputs(verb, inputs or [])
    record = run_stage(
        verb, given, out, _settings(settings), seed=seed, device=device, dtype=dtype, force=force
    )
    _print_record(record)


@app.command(name="eval")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="[NAME=]MODEL...", help="Models, the baseline first.")
    ],
    on: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]CORPUS", help="A corpus to measure on. Repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the scores.")] = Path("runs/eval"),
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As of evaluate.")
    ] = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure models side by side on corpora, with intervals."""
    from puna.run.alone import named, run_stage

    given: dict[str, Any] = {"models": named(models), **({"corpora": named(on)} if on else {})}
    record = run_stage("evaluate", given, out, _settings(settings), seed=seed, device=device, dtype=dtype)
    _print_record(record)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="MODEL|CORPUS|RECIPE|RUN", help="What to look at.")],
    scale: Scale = None,
    model: Annotated[str | None, typer.Option(help="Show a corpus as this model would learn it.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Rows of tokens to show.")] = 2,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a row.")] = None,
) -> None:
    """Show a model, a corpus, what a recipe learns, or a run."""
    from puna.run.look import look_at

    for part in look_at(target, scale=scale, model=model, samples=samples, length=length):
        _print(part)


@assets_app.command("ls")
def assets_list() -> None:
    """List every asset: size, licence, whether it is here."""
    from puna.core import assets

    table = _table("asset", "size", "licence", "here", "what")
    table.columns[0].no_wrap = True  # names are there to be copied; a long licence takes no room from them
    for name in assets.names():
        asset = assets.describe(name)
        here = "yes" if assets.local(asset) is not None else ""
        table.add_row(name, f"{asset.size / 1e6:.1f} MB", asset.licence, here, asset.what)
    _print(table, f"cache: {assets.cache_folder()}")


@assets_app.command("fetch")
def assets_fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Assets to fetch.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every asset.")] = False,
) -> None:
    """Fetch assets into the cache and print their paths."""
    from puna.core import assets

    if bool(names) == all_:
        raise PunaError("say what to fetch", expected="names of assets, or --all")
    for name in assets.names() if all_ else names or []:
        _print(str(assets.fetch(name)))


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Write the report of a run anew."""
    from puna.run.record import Run
    from puna.run.report import write_report

    _print(str(write_report(Run.open(folder).folder)))


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(help="An asset, a folder, a .gguf file or a hub id.")
    ] = "smollm2-135m-instruct",
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability to draw from.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Tokens to draw from; 0 is all.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Length of an answer at most.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    compare: Annotated[str | None, typer.Option(metavar="MODEL", help="A second model beside it.")] = None,
    strategy: Annotated[
        str, typer.Option(metavar="'NAME KEY=VALUE ...'", help="A decoding method by name.")
    ] = "",
    companions: Companions = None,
    quantize: Quantized = None,
    kernels: Kernels = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Talk to a model."""
    from puna.decode.chat import chat as talk
    from puna.decode.chat import named_strategy
    from puna.decode.sampling import Sampling
    from puna.run.machine import choose_device, choose_dtype
    from puna.text.pretrained import load_merged

    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    beside = named_paths(companions or (), "--companion").items()
    talk(
        load_merged(model, dtype=kind, device=where),
        sampling=Sampling(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        ),
        system=system,
        strategy=named_strategy(strategy),
        models={name: load_merged(source, dtype=kind, device=where) for name, source in beside},
        layout={"quantize": quantize, "kernels": kernels},
        compare=compare,
    )


app.command()(serve)
app.command()(ui)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="An asset, a folder, a .gguf file, an adapter or a hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder, or a file that ends in .gguf.")],
    to: Annotated[
        str | None, typer.Option("--format", help="hf, gguf or adapter; told from OUT by default.")
    ] = None,
    kind: Annotated[str, typer.Option(help="Weights of a GGUF file: f16, q8_0 or packed.")] = "f16",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Write a model in another format, tokenizer included."""
    from puna.run.convert import convert as write

    written, _ = write(source, out, to, kind=kind, dtype=dtype)
    _print(str(written))


@app.command()
def doctor(hub: Annotated[bool, typer.Option("--hub", help="Ask whether the hub answers.")] = False) -> None:
    """Tell what works on this machine."""
    from puna.run.doctor import examine

    table = _table("what", "state", "found")
    findings = examine(hub=hub)
    for finding in findings:
        table.add_row(finding.what, finding.state, finding.found)
    _print(table)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


@app.command()
def schema(out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write to.")] = None) -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from puna.core.files import write_json
    from puna.run.schema import recipe_schema

    if out is None:
        print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
    else:
        write_json(out, recipe_schema())


def _version(wanted: bool) -> None:
    if wanted:
        from puna import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options before the command."""


def _table(*headings: str) -> Table:
    from rich.table import Table

    return Table(*headings)


def _print_record(record: Any) -> None:
    from puna.run.look import metrics_table, report_tables

    _print(*report_tables(record), metrics_table(record), f"folder: {record.folder}")


def main() -> None:
    """Run the command line. Mistakes are told once, in red, with exit code 2; PUNA_DEBUG=1 shows where."""
    try:
        app()
    except PunaError as error:
        _told(error)
    except OSError as error:
        # The system refuses a file: no permission, a full disk, a folder where a file should be.
        file = error.filename2 or error.filename
        if error.strerror is None or (file is None and error.errno != errno.ENOSPC):
            _bug()
        _told(PunaError(error.strerror, where=file, fix="PUNA_DEBUG=1 shows what wanted it"))
    except Exception:
        _bug()


def _told(error: PunaError) -> NoReturn:
    """Print a mistake and exit with 2; to be called while an error is handled."""
    if os.environ.get("PUNA_DEBUG") == "1":
        traceback.print_exc()
    red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{red}{error}{plain}", file=sys.stderr)
    sys.exit(2)


def _bug() -> NoReturn:
    """Print the error that is being handled with its traceback and exit with 70."""
    traceback.print_exc()
    print("this is a bug in puna: please report it with the lines above", file=sys.stderr)
    sys.exit(70)


if __name__ == "__main__":
    main()
