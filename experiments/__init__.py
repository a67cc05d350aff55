"""Published experiments: one TOML file each, and the command that runs and compares them."""
