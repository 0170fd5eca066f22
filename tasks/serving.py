"""The registered model: MLflow loads this file by path, with `models/` beside it and nothing
else of the project.

Input: a DataFrame, one request a row. Column `n`: how many samples; and what the family takes:
`label` (a class name; with attributes, the names of those that hold, with commas between),
`text` (a caption, or what a model of text is to continue), `source` (the bytes of a PNG or JPEG
file; for in-painting one whose transparent pixels are the missing ones). Parameters: `seed`,
`temperature`, and what the family's `sample` takes besides (`steps`, `max_tokens`). Output: the
requests' samples in the order of their rows: uint8 images `[N, H, W, C]`; strings, for text;
cells of the grid `[N, 2]`, for points.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from models import store
from models.data import DataSpec

LARGEST_BATCH = 500
MAX_PIXELS = 64_000_000
# not Pillow's readers of drawings: a request must not start a PostScript interpreter
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA")


class Sampler(mlflow.pyfunc.PythonModel):
    """Draws samples from a model stored as safetensors and JSON."""

    def load_context(self, context: Any) -> None:
        self.model = store.load(Path(context.artifacts["model"]))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Raises ValueError for a request that is not `n` >= 0, that lacks a condition the model
        needs, or has one that it does not take or cannot read."""
        options = {"temperature": 1.0, **self.model.options, **(params or {})}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(int(options.pop("seed", 0)))
            parts = [self._draw(row, options) for row in model_input.to_dict("records")]
        levels = torch.cat(parts) if parts else torch.empty(0, *self.model.data.shape)
        return answer(levels, self.model.data)

    def _draw(self, request: dict[Any, Any], options: dict[str, Any]) -> torch.Tensor:
        n = int(request["n"])
        if n < 0:
            raise ValueError(f"n: {n} samples cannot be drawn; give 0 or more")
        unknown = set(request) - {"n"} - set(self.model.conditions)
        if unknown:
            takes = sorted({"n", *self.model.conditions})
            raise ValueError(f"{sorted(unknown)[0]}: unknown column; this model takes {takes}")
        one = {
            name: READERS[name](request[name], self.model.data)
            for name in self.model.conditions
            if not _absent(request.get(name))
        }
        parts = []
        for start in range(0, n, LARGEST_BATCH):
            count = min(LARGEST_BATCH, n - start)
            given: dict[str, Any] = {k: c.expand(count, *c.shape) for k, c in one.items()}
            parts.append(self.model.sample(count, **given, **options))
        return torch.cat(parts) if parts else torch.empty(0, *self.model.data.shape)


def answer(levels: torch.Tensor, data: DataSpec) -> np.ndarray[Any, Any]:
    """Samples as they are handed out: images, strings or cells."""
    if data.modality == "text":  # what is no UTF-8 is shown as such; zeros are after the end
        rows = [bytes(row).split(b"\0")[0] for row in levels.to(torch.uint8).tolist()]
        return np.array([row.decode(errors="replace") for row in rows], dtype=object)
    if data.modality == "points":
        return levels.to(torch.uint8).numpy()
    images = (levels.float() * (255 / (data.levels - 1))).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).numpy()


def _absent(value: Any) -> bool:
    """None, or the NaN that pandas puts in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_label(value: Any, data: DataSpec) -> torch.Tensor:
    """A class name to its number, or the names of attributes to 0 and 1."""
    text = str(value).strip()
    if data.attributes:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in data.attributes:
                raise ValueError(f"label: no attribute '{name}'; there are {list(data.attributes)}")
        return torch.tensor([int(a in names) for a in data.attributes])
    if text not in data.classes:
        raise ValueError(f"label: no class '{text}'; there are {list(data.classes)}")
    return torch.tensor(data.classes.index(text))


def read_text(value: Any, data: DataSpec) -> torch.Tensor:
    """A caption to its bytes, zeros after the end; or what is to be continued to its bytes."""
    encoded = str(value).encode()
    if data.modality == "text":
        return torch.tensor(list(encoded), dtype=torch.uint8)
    if not 0 < len(encoded) <= data.text_length:
        raise ValueError(f"text: {len(encoded)} bytes; 1 to {data.text_length} are possible")
    return torch.tensor(list(encoded.ljust(data.text_length, b"\0")), dtype=torch.uint8)


def read_source(value: Any, data: DataSpec) -> torch.Tensor:
    """The bytes of an image file to levels of the source's shape."""
    spec = data.source
    assert spec is not None
    channels, height, width = spec.shape
    masked = spec.kind == "masked"
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    try:
        with Image.open(io.BytesIO(value), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"source: {image.width}x{image.height} is too large")
            upright = ImageOps.exif_transpose(image)
            if upright.size != (width, height):
                found = f"{upright.width}x{upright.height}"
                raise ValueError(f"source: the image is {found}, the model takes {width}x{height}")
            if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
                raise ValueError(f"source: mode {image.mode} is not 8-bit")
            pixels = np.array(_flat(upright, masked).convert(modes[channels]))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"source: not an image file ({error})") from error
    planes = pixels.reshape(height, width, channels).transpose(2, 0, 1).astype(float)
    levels = np.round(planes * (data.levels - 1) / 255)
    if masked:  # alpha 0 is a hole
        hole = pixels[..., -1] < 128
        if not hole.any():
            raise ValueError("source: no pixel is transparent, so nothing is missing")
        levels[:-1, hole] = 0
        levels[-1] = hole * (data.levels - 1)
    return torch.from_numpy(levels.astype(np.uint8))


def _flat(image: Image.Image, masked: bool) -> Image.Image:
    """White under what is transparent, as when the data was prepared; a mask keeps its alpha."""
    if masked or not image.has_transparency_data:
        return image
    raised = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", raised.size, "white"), raised).convert("RGB")


READERS = {"label": read_label, "text": read_text, "source": read_source}


if __name__ != "tasks.serving":  # loaded by MLflow, not imported by a test or by a tool
    mlflow.models.set_model(Sampler())
