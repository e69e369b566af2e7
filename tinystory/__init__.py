"""tinystory: a small language model learns to tell stories by interacting with a teacher."""

__version__ = "0.1.0"
