"""Pairs of images from files: A|B side by side, or two sub-folders `source` and `target`."""

from __future__ import annotations

from pathlib import PurePosixPath

import fsspec
import numpy as np

from models.data import SourceSpec
from tasks.data.config import DatasetConfig
from tasks.data.images import Pixels, list_files, read_images, refuse, resize, stack
from tasks.data.sources import Raw
from tasks.errors import BadInput

SOURCE, TARGET = "source/", "target/"


def read_pairs(config: DatasetConfig) -> Raw:
    """What is translated (`source`) and into what (`x`).

    With two sub-folders, files of the same name (whatever their suffix) are pairs; with
    `paired: false` names do not matter, and no truth is known. With A|B, `source_side` says
    which half is the source.

    Raises:
        BadInput: no such folder, bad files, or files without a partner; each is named.
    """
    fs, root, names = list_files(config.path)
    folders = {n.split("/")[0] + "/" for n in names if "/" in n}
    if folders == {SOURCE, TARGET}:
        return _two_folders(config, fs, root, names)
    if folders:
        raise BadInput(
            f"dataset.path: {config.path} has the folders {', '.join(sorted(folders))}; expected "
            f"{SOURCE} and {TARGET}, or no folders and A|B in each file"
        )
    return _side_by_side(config, fs, root, names)


def _two_folders(
    config: DatasetConfig, fs: fsspec.AbstractFileSystem, root: str, names: list[str]
) -> Raw:
    bad = {n: f"outside {SOURCE} and {TARGET}" for n in names if "/" not in n}
    if config.paired:
        stems = {name: _partner(name) for name in names if name not in bad}
        sides = [[s for n, s in stems.items() if n.startswith(f)] for f in (SOURCE, TARGET)]
        alone = set(sides[0]) ^ set(sides[1])
        twice = {s for side in sides for s in side if side.count(s) > 1}
        bad |= {n: "has no partner in the other folder" for n, s in stems.items() if s in alone}
        bad |= {n: "one of several files of that name" for n, s in stems.items() if s in twice}
    images: dict[str, Pixels] = {}
    for folder in (SOURCE, TARGET):
        chosen = [n for n in names if n.startswith(folder) and n not in bad]
        found, worse = read_images(fs, root, chosen, config.image_size)
        images |= found
        bad |= worse
    if config.paired:  # a bad file takes its partner with it
        lost = {_partner(n) for n in bad if "/" in n}
        images = {n: image for n, image in images.items() if n in bad or _partner(n) not in lost}
    images, skipped = refuse(config, images, bad)
    stacks = []
    for folder in (SOURCE, TARGET):
        side = {
            _partner(n) if config.paired else n: image
            for n, image in images.items()
            if n.startswith(folder)
        }
        if not side:
            raise BadInput(f"dataset.path: {config.path}/{folder} holds no usable image")
        stacks.append(stack([side[stem] for stem in sorted(side)]))
    return _raw(stacks[0], stacks[1], config, skipped, truth=config.paired)


def _side_by_side(
    config: DatasetConfig, fs: fsspec.AbstractFileSystem, root: str, names: list[str]
) -> Raw:
    as_it_is = config.image_size is None
    images, bad = read_images(fs, root, names, None, one_size=as_it_is)
    bad |= {n: f"is {i.shape[1]} wide, which is odd" for n, i in images.items() if i.shape[1] % 2}
    images, skipped = refuse(config, images, bad)
    halves: tuple[list[Pixels], list[Pixels]] = ([], [])
    for image in images.values():
        for half, part in zip(halves, np.split(image, 2, 1), strict=True):
            half.append(resize(part, config.image_size))
    left, right = (stack(half) for half in halves)
    source, x = (left, right) if config.source_side == "left" else (right, left)
    return _raw(source, x, config, skipped, truth=True)


def _raw(
    source: Pixels, x: Pixels, config: DatasetConfig, skipped: list[dict[str, str]], *, truth: bool
) -> Raw:
    spec = SourceSpec(kind="pair", shape=source.shape[1:], aligned=config.paired, truth=truth)
    provenance = {"source": "paired_folder", "files": str(len(x))}
    return Raw(
        x=x, levels=256, source=source, source_spec=spec, provenance=provenance, skipped=skipped
    )


def _partner(name: str) -> str:
    """What the names of a pair have in common: the path below the folder, without suffix."""
    return str(PurePosixPath(name.split("/", 1)[1]).with_suffix(""))
