"""From a file of prompts to a file of answers."""

__all__: list[str] = []
