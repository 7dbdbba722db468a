"""Programs for users: predict, visualize, export, reports, list files, weights."""
