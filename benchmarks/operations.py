"""Operations of a training step, counted: convolutions and matrix products, attack included.

By hand because torch's FlopCounterMode also follows modules, by hooks that do not work under
`torch.autograd.grad`, which attacks and double backward need.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from derkit.config import TrainConfig
from derkit.training.loop import train_step
from derkit.training.objectives import Objective, make_regularizer
from derkit.util import make_generator


class Operations(TorchDispatchMode):
    """Counts operations while it is entered; a multiply-add counts two."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def operations_per_image(build: Callable[[], nn.Module], x: Tensor, y: Tensor,
                         config: TrainConfig) -> float:
    """Operations of one step per image of x (B, C, H, W), y (B,): attack, regulariser, backward."""
    model = build().to(x.device).train()
    regularizer = make_regularizer(config, model)
    with Operations() as counter:
        loss, _ = train_step(model, x, y, Objective(config), regularizer, config.strength,
                             make_generator(x.device, 0))
        loss.backward()
    return counter.total / len(x)
