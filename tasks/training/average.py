"""The moving average of the weights: what is evaluated, and what leaves the training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Slot = tuple[dict[str, Any], str]  # where a module keeps a tensor, which it may replace


class MovingAverage(AveragedModel):
    """Exponential moving average of the parameters and buffers of `model`, which starts as a plain
    mean: decay <= (1 + n) / (10 + n) after n updates. What is not a float is copied.

    torch's class finds and groups all tensors anew at every update, which takes longer than to
    average those of a small model; here that is done once. The state dict is torch's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self._count: int | None = None  # of updates; None: what `n_averaged` says
        self._groups: dict[tuple[torch.device, torch.dtype], list[tuple[Slot, Slot]]] = {}
        for mine, theirs in zip(_slots(self.module), _slots(model), strict=True):
            tensor = _tensor(mine)
            self._groups.setdefault((tensor.device, tensor.dtype), []).append((mine, theirs))
        self.register_load_state_dict_post_hook(_recount)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model as it is now."""
        n = int(self.n_averaged) if self._count is None else self._count
        weight = 1.0 - min(self.decay, (1.0 + n) / (10.0 + n))
        for (_, dtype), slots in self._groups.items():
            averaged = [_tensor(mine) for mine, _ in slots]
            current = [_tensor(theirs) for _, theirs in slots]
            if n and dtype.is_floating_point:
                torch._foreach_lerp_(averaged, current, weight)
            else:  # the first update, and counters
                torch._foreach_copy_(averaged, current)
        self.n_averaged += 1
        self._count = n + 1


def _recount(average: nn.Module, _: Any) -> None:
    average._count = None  # type: ignore[assignment]


def _slots(model: nn.Module) -> Iterator[Slot]:
    """Of all parameters and buffers, each tensor once."""
    seen: set[int] = set()
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield kept, name


def _tensor(slot: Slot) -> Tensor:
    kept, name = slot
    tensor: Tensor = kept[name]
    return tensor
