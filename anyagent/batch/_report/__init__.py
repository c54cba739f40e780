"""A page that shows how a run went."""

__all__: list[str] = []
