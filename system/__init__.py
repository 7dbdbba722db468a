"""Signals, files, the processor and connections between processes; only paddle_import and paddle_internals need Paddle."""
