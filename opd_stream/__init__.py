"""opd-stream: on-policy distillation of language models from a cache of teacher scores."""

__version__ = "0.1.0"
