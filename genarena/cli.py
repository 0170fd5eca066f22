"""The console command `genarena`. Imports are inside the commands: `--help` must be instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Which generative model should I use on my data? Train them all and see.",
)


@app.command()
def run(
    dataset: Annotated[str, typer.Option(help="digits, mnist, image_folder or paired_folder")] = "",
    data_path: Annotated[str, typer.Option(help="Folder of the data set's files")] = "",
    families: Annotated[str, typer.Option(help="Names with spaces between, or 'all'")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of each family, as in '0 1 2'")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="Training budget per family")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="The same, as images seen")] = None,
    minutes: Annotated[float | None, typer.Option(help="The same, as time")] = None,
    flops: Annotated[float | None, typer.Option(help="The same, as 1e15 of arithmetic")] = None,
    captions: Annotated[
        str, typer.Option(help="Templates with ; between: a handwritten {name}; the digit {name}")
    ] = "",
    set_: Annotated[list[str], typer.Option("--set", help="key=value of params.yaml")] = [],  # noqa: B006
) -> None:
    """Run the comparison. What the options say is written into params.yaml first."""
    from genarena.api import start_early

    server = start_early()  # is up when the rest is imported
    from genarena.command import run_comparison

    budget = {"steps": steps, "images": images, "minutes": minutes, "flops": flops}
    run_comparison(dataset, data_path, families, seeds, budget, captions, set_, server)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Git revision, comparison in MLflow, or .")],
    b: Annotated[str, typer.Argument(help="The same; . is the folder as it is")] = ".",
) -> None:
    """Say what changed between two comparisons, and whether it is more than noise."""
    from genarena.diff import show_difference

    show_difference(a, b)


@app.command("families")
def list_families() -> None:
    """List the model families and what each can do."""
    from genarena.show import show_families

    show_families()


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="models:/digits-vae@champion, digits-vae or vae")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many samples")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for the files")] = Path("samples"),
    seed: Annotated[int, typer.Option(help="Same seed, same samples")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="Spread of the latents")] = 1.0,
    label: Annotated[str, typer.Option(help="Class to sample, or attributes with commas")] = "",
    text: Annotated[str, typer.Option(help="Caption to sample, or text to continue")] = "",
    source: Annotated[list[Path], typer.Option(help="Image file to translate; may repeat")] = [],  # noqa: B006
    set_: Annotated[
        list[str], typer.Option("--set", help="An option of the family: steps=20; may repeat")
    ] = [],  # noqa: B006
) -> None:
    """Draw samples from a registered model (or a trained family) into files."""
    from genarena.sampling import draw_samples

    draw_samples(model, n, out, seed, temperature, label, text, source, set_)


@app.command()
def retrain(
    model: Annotated[str, typer.Argument(help="models:/digits-vae/3, digits-vae or vae")],
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: .genarena/retrained/<name>-<version>")
    ] = None,
) -> None:
    """Restore a registered version's code, parameters and data, train it again, compare."""
    from genarena.retrain import retrain

    raise typer.Exit(retrain(model, out))


registry = typer.Typer(no_args_is_help=True, help="Registered versions: list them, roll back.")
app.add_typer(registry, name="registry")


@registry.command("list")
def list_versions(
    name: Annotated[str, typer.Argument(help="digits-vae, or vae; default: all")] = "",
) -> None:
    """List registered versions: alias, score, data, and why each has its alias."""
    from genarena.registry import show_versions

    show_versions(name)


@registry.command()
def rollback(
    name: Annotated[str, typer.Argument(help="digits-generator, or a family's name")],
    reason: Annotated[str, typer.Option(help="Why; written on both versions")] = "",
) -> None:
    """Make the champion before this one champion again; once more goes further back."""
    from genarena.registry import roll_back

    roll_back(name, reason)


@app.command()
def ui(
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535)] = 4200,
) -> None:
    """Open the MLflow UI and the Prefect UI on localhost, until Ctrl-C."""
    from genarena.servers import serve

    serve(mlflow_port, prefect_port)


@app.command()
def doctor() -> None:
    """Say what this machine has, what is missing and how to get it."""
    from genarena.doctor import report

    raise typer.Exit(report())
