"""From histories and items to the token rows of their prompts."""

from r2ec_fast.prompts.builder import PromptBuilder, PromptConfig

__all__ = ["PromptBuilder", "PromptConfig"]
