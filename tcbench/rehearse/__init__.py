"""A suite tried out before its files are there: stand-ins of what it names, and every stage on a few samples."""
