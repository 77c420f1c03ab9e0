"""The tiny world, whose prompts, rewards and offline pairs serve every family."""

from tests.world import world

__all__ = ["world"]
