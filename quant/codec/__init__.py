"""Updates as bytes: packing, entropy coding, layout, and their strict validation."""
