"""The one training loop of sadmoe, what it minimises, and what it leaves behind if it is killed or fails."""

from sadmoe.training.config import LoopConfig, Step
from sadmoe.training.resume import Checkpoint

__all__ = ["Checkpoint", "LoopConfig", "Step"]
