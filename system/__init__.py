"""Signals, files, the processor and connections between processes; only paddle_import needs Paddle."""
