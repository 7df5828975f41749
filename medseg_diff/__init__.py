"""Diffusion made practical for medical image segmentation: many plausible masks, one honest answer."""

__version__ = "0.1.0"
