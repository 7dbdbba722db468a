"""Programs for maintainers: benchmarks and the table of models."""
