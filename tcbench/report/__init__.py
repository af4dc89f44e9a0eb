"""Score files in; tables, figures and image grids out. Nothing here imports torch, so it is quick."""
