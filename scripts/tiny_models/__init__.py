"""Tiny models of every model type that transformers builds language models of, for tests and generators.

Sizes are set by field name (`sizes`), what that cannot know stands in one row per model type (`rows`), and configs are
made of both (`shrink`). `python -m scripts.tiny_models [MODEL_TYPE ...]` builds them and prints what came out.
"""

from __future__ import annotations

from .building import MAPPINGS, NOT_BUILDABLE, build, cases, class_of, config_of, config_of_class

__all__ = ["MAPPINGS", "NOT_BUILDABLE", "build", "cases", "class_of", "config_of", "config_of_class"]
