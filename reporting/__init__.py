"""The pages about runs and predictions."""
