"""The old place of ``PromptAssembler``: `r2ec_fast.prompts.segments`. Goes with release 0.2."""

from r2ec_fast.prompts.segments import PromptAssembler

__all__ = ["PromptAssembler"]
