"""What a run measures of itself."""

__all__: list[str] = []
