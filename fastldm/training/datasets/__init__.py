"""Datasets of {"image", "caption", "label"} items: the built-in captioned shapes and folders of pictures."""

from fastldm.training.datasets.shapes import CaptionedShapes

__all__ = ["CaptionedShapes"]
