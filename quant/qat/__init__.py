"""Quantization-aware layers, their activations, and calibrated rounding (GPTQ)."""
