"""From a list file to batches: reading, augmentation, mixing."""
