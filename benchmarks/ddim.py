"""DDIM sampling: ours against diffusers' pipeline, the same network, the same number of steps.

    .venv-bench/bin/python -m benchmarks.ddim --json ddim.json

Random weights, fp32, 28x28. diffusers gets our U-Net as a model of its own, and its `DDIMPipeline`
hands out arrays (no PIL images, no progress bar); ours hands out uint8 levels.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMPipeline, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from benchmarks.pairs import Row, alternate, arguments, report, versions
from models.data import DataSpec
from models.ddpm import DDPM, DDPMConfig
from models.unet import UNet


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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 16, 64])
    options = parser.parse_args()
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

    rows = []
    for n in options.images:
        turns = {
            "ours": partial(seconds, partial(ours, n)),
            "theirs": partial(seconds, partial(theirs, n)),
        }
        for run in turns.values():
            run()
        name = f"{n} images, {options.steps} steps, fp32"
        found = alternate(turns, options.rounds, name)
        rows.append(
            Row(name, "s", found["ours"], found["theirs"], 1.2, "diffusers", more_is_better=False)
        )
        report("DDIM sampling", rows, options, versions=versions("torch", "diffusers"))


if __name__ == "__main__":
    main()
