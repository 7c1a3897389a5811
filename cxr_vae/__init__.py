"""Variational autoencoders for chest X-rays, from a folder of images to metrics one can trust."""

__version__ = "0.1.0"
