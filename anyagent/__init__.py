"""Structured-concurrency client for AI agents that answer over a WebSocket."""
