"""All that a run needs to go on. The random numbers of a step come from the seed and the step alone."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medseg_diff.checkpoint import build, load_state, save_state
from medseg_diff.config import Config, Train
from medseg_diff.datasets.cache import Volume
from medseg_diff.errors import UserError, reason
from medseg_diff.training.objective import VolumeScore, class_weights

MEAN_HEAD = 0.85
"""Share of the budget for the encoder of the conditional network and its mean head. The denoiser comes after them: it
learns how far from the borders that they see the masks differ, which is another question as long as they move."""

PARTS = ("network", "average", "optimizer", "score")


@dataclass
class State:
    """A run between two steps.

    `average` is the moving average of the weights, `best` the best validation so far, `stale` how many in a row did not
    improve on it, `recent` the losses since the last entry in the history. `denoising` is the second stage, which only
    the conditional network has; `stage_step` and `stage_elapsed_s` are step and time at which the present stage began.
    """

    network: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    score: VolumeScore
    class_weight: Tensor
    step: int = 0
    denoising: bool = False
    stage_step: int = 0
    stage_elapsed_s: float = 0.0
    elapsed_s: float = 0.0
    validated: int = 0
    validated_step: int = 0
    best: float = -float("inf")
    stale: int = 0
    skipped: int = 0
    tracking_id: str | None = None
    dataset_digest: str = ""
    recent: list[float] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes it whole or not at all."""
        counters = {name: value for name, value in vars(self).items() if name not in PARTS}
        save_state(path, {name: getattr(self, name).state_dict() for name in PARTS} | {"counters": counters})

    def load(self, path: Path, device: torch.device) -> None:
        """Takes up what `save` wrote. Raises UserError."""
        held = load_state(path, device)
        try:
            for name in PARTS:
                getattr(self, name).load_state_dict(held[name])
            for name, value in held["counters"].items():
                setattr(self, name, value)
        except (KeyError, RuntimeError, ValueError, AttributeError) as error:
            advice = "Start again with --fresh, or train with the version that began."
            raise UserError(path, f"it is of another version's network ({reason(error)})", advice) from error

    def spent(self, budget: Train) -> float:
        """Share of the budget, in steps or in minutes, whichever is further."""
        return _share(self.step, self.elapsed_s, budget)

    def stage_spent(self, config: Config) -> float:
        """Share of the budget of the present stage."""
        begun = _share(self.stage_step, self.stage_elapsed_s, config.train)
        length = MEAN_HEAD if config.network.kind == "conditional" else 1.0
        if self.denoising:
            length = 1 - max(MEAN_HEAD, begun)
        return (self.spent(config.train) - begun) / length if length > 0 else 1.0

    def impatient(self, budget: Train) -> bool:
        """Whether validations have not improved for too long."""
        return budget.patience is not None and self.stale >= budget.patience

    def teach_denoiser(self, best: nn.Module | None = None) -> None:
        """Begins the second stage: encoder and mean head rest, those of `best` where it is given."""
        if best is not None:
            for network in (self.network, self.average):
                network.load_state_dict(best.state_dict())
        self.denoising, self.stage_step, self.stage_elapsed_s = True, self.step, self.elapsed_s

    def extend(self, budget: Train) -> None:
        """Goes back to the first stage if the second had begun and the budget has been raised since."""
        if self.denoising and self.spent(budget) < MEAN_HEAD and not self.impatient(budget):
            self.denoising, self.stage_step, self.stage_elapsed_s = False, 0, 0.0


def _share(step: int, elapsed_s: float, budget: Train) -> float:
    return max(step / budget.steps, elapsed_s / 60 / budget.max_minutes if budget.max_minutes else 0.0)


def begin(config: Config, channels: int, classes: int, device: torch.device, volumes: Sequence[Volume] = ()) -> State:
    """A run at step 0, its weights drawn from the seed; `volumes` tell how rare each class is."""
    network = build(config, channels, classes).to(device)
    average = copy.deepcopy(network).requires_grad_(False)
    decay = config.train.weight_decay
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.train.lr, betas=(0.9, 0.99), weight_decay=decay, fused=True
    )
    known = volumes and config.network.kind == "conditional"
    weight = class_weights(class_shares(volumes, classes)) if known else torch.ones(classes)
    return State(network, average, optimizer, VolumeScore(classes).to(device), weight.to(device))


def class_shares(volumes: Sequence[Volume], classes: int) -> Float[Tensor, "classes"]:
    """The share of the voxels that each class has."""
    counts = torch.stack(
        [torch.bincount(volume.labels.flatten(), minlength=classes)[:classes] for volume in volumes]
    ).sum(0)
    return counts / counts.sum()
