"""What lies outside of the package: where things are found, and files that others made. Imports no torch."""
