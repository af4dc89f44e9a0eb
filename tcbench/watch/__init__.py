"""A method is watched: what it raises, returns, chooses and changes. Imports no torch, but for `undisturbed`."""
