"""`genarena sample`: samples of a registered model into files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genarena.project import enter_project
from genarena.show import console
from tasks.environment import prepare_environment
from tasks.errors import BadInput, exit_on_bad_input
from tasks.params import Params, load_params


def draw_samples(
    model: str,
    n: int,
    out: Path,
    seed: int,
    temperature: float,
    label: str,
    text: str,
    source: list[Path],
    options: list[str],
) -> None:
    """`genarena sample`: a registered model by URI or name, or a trained family from disk.

    `n` samples of the condition, or of each source where several are given. `options` are
    `key=value` of what the family's `sample` takes besides (`steps=20`).
    """
    with exit_on_bad_input("genarena"):
        asked: dict[str, Any] = {name: v for name, v in (("label", label), ("text", text)) if v}
        requests = [{"n": n, **asked}]
        if source:
            for file in source:
                if not file.is_file():
                    raise BadInput(f"--source: no file at {file}")
            requests = [{"n": n, **asked, "source": file.read_bytes()} for file in source]
        home = Path.cwd()
        enter_project()
        prepare_environment()
        folder = (home / out).absolute()
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"--out: {out} is a file; give a folder")
        given = dict(_pair(option) for option in options)
        samples = _draw(
            model, load_params(), requests, {"seed": seed, "temperature": temperature, **given}
        )
        folder.mkdir(parents=True, exist_ok=True)
        console.print(f"{_write(samples, folder)} in {folder}")


def _pair(option: str) -> tuple[str, str]:
    name, equals, value = option.partition("=")
    if not equals:
        raise BadInput(f"--set: '{option}' is not key=value")
    return name.strip(), value


def _write(samples: Any, folder: Path) -> str:
    """Images to PNG files, texts to text files (and to the terminal), points to one table."""
    from tasks.storing import save

    if samples.dtype == object:
        for number, text in enumerate(samples):
            (folder / f"{number:05d}.txt").write_text(text)
            console.rule(str(number))
            console.print(text, markup=False)
        return f"{len(samples)} texts"
    if samples.ndim == 2:
        lines = [",".join(map(str, row)) for row in samples.tolist()]
        (folder / "points.csv").write_text("\n".join(["x,y", *lines]) + "\n")
        return f"{len(samples)} points"
    for number, image in enumerate(samples):
        save(folder / f"{number:05d}.png", image)
    return f"{len(samples)} images"


def _draw(
    model: str, params: Params, requests: list[dict[str, Any]], options: dict[str, Any]
) -> Any:
    from tasks import packaging, versions
    from tasks.drawing import checked, drawn

    uri = versions.spelled(params, model)
    loaded = packaging.load(params, uri)
    return drawn(loaded, uri, requests, checked(loaded, uri, requests, options))
