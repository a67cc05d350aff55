"""Optimizers for low-bit training, which keep the weights on their grid."""
