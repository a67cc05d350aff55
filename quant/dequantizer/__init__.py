"""The progressive dequantizer: its ladder of rungs, and their training."""
