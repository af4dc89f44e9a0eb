"""Suite configs: their schema, reading and checking. Imports no torch."""
