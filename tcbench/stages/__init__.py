"""The workflow's stages: each reads a suite config and earlier stages' files, and writes files; the CLI calls them."""
