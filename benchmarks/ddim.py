"""DDIM sampling: ours against diffusers' pipeline, the same network, the same number of steps.

    .venv-bench/bin/python -m benchmarks.ddim --json ddim.json

Random weights, fp32, 28x28. diffusers gets our U-Net as a model of its own, and its `DDIMPipeline`
hands out arrays (no PIL images, no progress bar); ours hands out uint8 levels. Each side has a
process of its own, ours set up as the workers that sample are.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMPipeline, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from benchmarks.pairs import Contender, Row, alternate, arguments, report, versions
from models.data import DataSpec
from models.ddpm import DDPM, DDPMConfig
from models.unet import UNet
from tasks.environment import keep_freed_memory


class Theirs(ModelMixin, ConfigMixin):
    """Our U-Net as diffusers wants one."""

    @register_to_config
    def __init__(self, sample_size: int = 28, in_channels: int = 1, width: int = 32) -> None:
        super().__init__()
        shape = (in_channels, sample_size, sample_size)
        self.net = UNet(shape, in_channels, width=width, blocks=1, attention=49)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return UNet2DOutput(sample=self.net(x, t.to(x.dtype).expand(len(x))))


def seconds(draw: Any) -> float:
    torch.manual_seed(0)
    begun = time.perf_counter()
    draw()
    return time.perf_counter() - begun


def serve(side: str, options: argparse.Namespace) -> None:
    """One side, in a process of its own: answers a number of images with seconds."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = DDPM(DDPMConfig(), DataSpec(shape=(1, 28, 28), levels=256)).eval()
    net = Theirs().eval()
    net.net.load_state_dict(model.net.state_dict())
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    pipeline = DDIMPipeline(net, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def ours(n: int) -> None:
        model.sample(n, steps=options.steps)

    def theirs(n: int) -> None:
        pipeline(batch_size=n, num_inference_steps=options.steps, output_type="np")

    if side == "ours":
        keep_freed_memory()  # as a worker that samples does
    draw = ours if side == "ours" else theirs
    for n in options.images:
        draw(n)
    Contender.serve({}, lambda n: seconds(partial(draw, int(n))))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(options.child, options)
        return
    words = [f"--threads={options.threads}", f"--steps={options.steps}"]
    words += ["--images", *map(str, options.images)]
    sides = {w: Contender("benchmarks.ddim", f"--child={w}", *words) for w in ("ours", "theirs")}
    rows = []
    for n in options.images:
        name = f"{n} images, {options.steps} steps, fp32"
        turns = {who: partial(side.ask, str(n)) for who, side in sides.items()}
        found = alternate(turns, options.rounds, name)
        rows.append(
            Row(name, "s", found["ours"], found["theirs"], 1.2, "diffusers", more_is_better=False)
        )
        report("DDIM sampling", rows, options, versions=versions("torch", "diffusers"))
    for side in sides.values():
        side.end()


if __name__ == "__main__":
    main()
