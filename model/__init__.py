"""The network: attention, layers, and the loading of weights."""
