"""Training and evaluation: the engine, what it is built from, checkpoints and records."""
