"""dinoct: a folder of CT scans in, a self-supervised vision encoder out."""

__version__ = "0.1.0"
