"""A feature extractor of the user's own: `evaluation.features: module:function`.

The contract: `function(levels)`, `levels` being the number of integer levels of the data (256 for
8-bit images), returns a callable (an `nn.Module` is moved to the device) that takes a uint8 tensor
`[N, C, H, W]` of levels 0 .. levels - 1 and returns N rows of floats `[N, D]`, one for each
image whatever the others are, as a tensor or an array. `evaluation.features_code` is the module's
file: its hash is the extractor's identity, and DVC measures again when it changes; weights that
the module reads belong into that hash by being named in it (a version or a checksum).

    # myfeatures.py; features: myfeatures:blocks; features_code: myfeatures.py
    def blocks(levels):
        return lambda x: torch.nn.functional.avg_pool2d(x.float() / (levels - 1), 2).flatten(1)
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.data import DataSpec
from models.store import file_sha256
from tasks.errors import BadInput, nearest
from tasks.evaluation.features import Extractor


def extractor(reference: str, code: Path, data: DataSpec, device: torch.device) -> Extractor:
    """The extractor `module:function`, tried on two black images.

    Raises BadInput where it cannot be imported or made, or does not keep the contract.
    """
    where = f"evaluation.features: {reference}"
    function = _function(reference, code)
    try:
        made = function(data.levels)
    except Exception as error:  # whatever the user's code raises, the line must say whose it is
        raise BadInput(f"{where}: calling it failed: {type(error).__name__}: {error}") from error
    if not callable(made):
        raise BadInput(f"{where}: returned {made!r}, not something to call with images")
    if isinstance(made, nn.Module):
        made = made.eval().to(device)

    def network(x: Tensor) -> Tensor:
        try:
            found = torch.as_tensor(made(x))
        except Exception as error:
            raise BadInput(
                f"{where}: failed on {_of(x)}: {type(error).__name__}: {error}"
            ) from error
        if found.ndim != 2 or len(found) != len(x) or not found.is_floating_point():
            raise BadInput(
                f"{where}: gave {_of(found)} for {_of(x)}; it must give one row of floats for each "
                f"image, [{len(x)}, D]"
            )
        return found

    network(torch.zeros(2, *data.shape, dtype=torch.uint8, device=device))
    return Extractor(reference, file_sha256(code), network, device)


def _function(reference: str, code: Path) -> Callable[[int], Any]:
    module, _, name = reference.partition(":")
    where = f"evaluation.features: {reference}"
    tail = Path(*module.split(".")).with_suffix(".py")
    if code.parts[-len(tail.parts) :] != tail.parts:
        raise BadInput(
            f"evaluation.features_code: {code} is not the file of the module {module}: that ends "
            f"in {tail}"
        )
    if not code.is_file():
        raise BadInput(f"evaluation.features_code: {code} does not exist")
    root = str(code.absolute().parents[len(tail.parts) - 1])
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        imported = importlib.import_module(module)
    except Exception as error:
        raise BadInput(f"{where}: cannot be imported: {type(error).__name__}: {error}") from error
    found = Path(imported.__file__ or "")
    if found.resolve() != code.resolve():
        raise BadInput(f"{where}: the module {module} is {found}, not {code}; give it another name")
    if not callable(getattr(imported, name, None)):
        functions = [n for n, v in vars(imported).items() if callable(v) and not n.startswith("_")]
        raise BadInput(f"{where}: {code} has no function '{name}'{nearest(name, functions)}")
    return getattr(imported, name)


def _of(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
