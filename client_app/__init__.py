"""The ClientApp: declares the bit-width, trains, evaluates."""
