"""The ServerApp: settings to strategy, rounds, evaluation per bit-width, run record."""
