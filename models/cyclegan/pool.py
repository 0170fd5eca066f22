"""The fakes of earlier steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.nn import gather_batch
from models.noise import noise_shard, rand, shard


class ImagePool(nn.Module):
    """The history of fakes that a discriminator is shown (Shrivastava et al. 2017).

    One image after the other, of the batch of all workers: while the pool is not full, the
    image joins it and is shown; then, by a fair coin, the image is shown, or an old one is
    shown and the image takes its place. The pool is the same on all workers.
    """

    images: Tensor
    count: Tensor

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, fakes: Tensor) -> Tensor:
        """This worker's fakes `[B, *shape]` to what it is to show, `[B, *shape]`."""
        size, (rank, world) = len(self.images), shard()
        if size == 0:
            return fakes
        arrived = gather_batch(fakes.float()) if world > 1 else fakes.detach().float()
        with noise_shard(0, 1):  # every worker draws for everybody's images
            draws = rand((len(arrived), 2), fakes.device).tolist()
        everything = torch.cat([self.images, arrived])
        kept, shown, count = list(range(size)), [], int(self.count)
        for row, (coin, place) in enumerate(draws, size):
            if count < size:
                kept[count] = row
                count += 1
                shown.append(row)
            elif coin < 0.5:
                old = int(place * size)
                shown.append(kept[old])
                kept[old] = row
            else:
                shown.append(row)
        self.images.copy_(everything[kept])
        self.count.fill_(count)
        return everything[shown[rank * len(fakes) : (rank + 1) * len(fakes)]]
