"""Datasets, their images as network input, and their partition among the clients."""
