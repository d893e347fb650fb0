"""Layers of the towers by their depth: learning rates that fall towards the input, and locks that start there.

A tower with L blocks has L + 2 groups: 0 all before the blocks (stem or token embedding, positions), 1 to L the blocks,
L + 1 all after them (final norm, pooling, projection).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mmbase.models.clip import CLIP

TOWERS = {"visual": "vision", "text": "text"}
"""Names of the towers in the model, and in configurations."""
_AFTER = ("norm", "attention_pool", "proj")
_BLOCKS = ("transformer", "blocks")


class Depth(NamedTuple):
    """Where in which tower a layer stands."""

    tower: str
    """vision or text"""
    group: int
    groups: int

    @property
    def above(self) -> int:
        """How many groups stand between this one and the output."""
        return self.groups - 1 - self.group


def depth_of(model: CLIP, name: str) -> Depth | None:
    """The group of a parameter or module by its name in ``model``; None for scale and bias, which are of no tower."""
    tower, *rest = name.split(".")
    if tower not in TOWERS or not rest:
        return None
    blocks = len(getattr(model, tower).transformer.blocks)
    if tuple(rest[:2]) == _BLOCKS and len(rest) > 2:
        group = 1 + int(rest[2])
    else:
        group = blocks + 1 if rest[0] in _AFTER else 0
    return Depth(TOWERS[tower], group, blocks + 2)


class TowerLocks:
    """Groups of the towers that are not trained, from the input on; they may change between steps.

    Batch normalisation of a locked group takes its running statistics, and leaves them as they are. An optimiser that
    was built before keeps all parameters and passes over those that are locked; their moments wait.

    Args:
        model: only what is trained now is ever unlocked.
    """

    def __init__(self, model: CLIP) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._parameters = [(depth, p) for name, p in trained if (depth := depth_of(model, name))]
        self._norms = [
            (depth, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (depth := depth_of(model, name))
        ]

    def set(self, vision: int, text: int) -> bool:
        """Lock as many groups of each tower, all others being free. Call before every step, on all ranks alike.

        Returns:
            Whether a parameter changed; if so, call :meth:`~mmbase.training.parallel.Parallel.locks_changed`.
        """
        locked = {"vision": vision, "text": text}
        changed = False
        for depth, parameter in self._parameters:
            trains = depth.group >= locked[depth.tower]
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
                parameter.grad = None
                changed = True
        for depth, norm in self._norms:  # anew each time: model.train() knows nothing of locks
            if depth.group < locked[depth.tower]:
                norm.eval()
            elif changed:
                norm.train()
        return changed
