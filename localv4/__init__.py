"""localv4: run DeepSeek-V4-Flash-class models on a high-RAM laptop."""

__version__ = "0.1.0"
