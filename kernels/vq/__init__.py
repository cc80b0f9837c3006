"""Nearest code and codebook statistics."""

from .ema_update import forward as ema_update_forward
from .ema_update import supports as ema_update_supports
from .nearest import forward as nearest_forward
from .nearest import supports as nearest_supports

__all__ = ["ema_update_forward", "ema_update_supports", "nearest_forward", "nearest_supports"]
