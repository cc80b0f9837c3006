"""Data sets of {"image", "caption", "label"} items: the built-in captioned shapes and folders of pictures."""

from fastldm.training.datasets.image_folder import ImageFolder, export_image_folder
from fastldm.training.datasets.shapes import CaptionedShapes

__all__ = ["CaptionedShapes", "ImageFolder", "export_image_folder"]
