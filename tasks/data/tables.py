"""Tables that lie beside a folder of images: `captions.csv` and `attributes.csv`."""

from __future__ import annotations

import io

import fsspec
import pandas as pd

from tasks.errors import BadInput

CAPTIONS, ATTRIBUTES = "captions.csv", "attributes.csv"
MOST_ATTRIBUTES = 62  # they are stored as the bits of one integer


def read_captions(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, list[str]]:
    """File name -> its captions; the columns are `file` and `caption`, a file may repeat."""
    table = _read(fs, root, CAPTIONS)
    if list(table.columns) != ["file", "caption"]:
        raise BadInput(f"{root}/{CAPTIONS}: columns {list(table.columns)}, not file, caption")
    captions: dict[str, list[str]] = {}
    for file, caption in zip(table["file"], table["caption"], strict=True):
        if not caption.strip():
            raise BadInput(f"{root}/{CAPTIONS}: {file} has an empty caption")
        captions.setdefault(file, []).append(" ".join(caption.split()))
    return captions


def read_attributes(
    fs: fsspec.AbstractFileSystem, root: str
) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Names, and file name -> 0 or 1 for each; column `file`, then one for each attribute.

    -1 counts as 0, for that is how CelebA writes it.
    """
    table = _read(fs, root, ATTRIBUTES)
    names = tuple(table.columns[1:])
    where = f"{root}/{ATTRIBUTES}"
    if not names or table.columns[0] != "file" or len(names) > MOST_ATTRIBUTES:
        raise BadInput(f"{where}: needs the column file and 1 to {MOST_ATTRIBUTES} attributes")
    values = {"0": 0, "1": 1, "-1": 0}
    found = {}
    for row in table.itertuples(index=False):
        wrong = [v for v in row[1:] if v.strip() not in values]
        if wrong:
            raise BadInput(f"{where}: {row[0]}: {wrong[0]!r} is neither 0 nor 1")
        if row[0] in found:
            raise BadInput(f"{where}: {row[0]} stands twice")
        found[str(row[0])] = [values[v.strip()] for v in row[1:]]
    return names, found


def _read(fs: fsspec.AbstractFileSystem, root: str, name: str) -> pd.DataFrame:
    try:
        content = fs.cat_file(f"{root.rstrip('/')}/{name}")
        return pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise BadInput(f"{root}/{name}: not a CSV table ({error})") from error
