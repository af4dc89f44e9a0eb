"""`tcbench golden`: the harness against outputs of the original public code, case by case."""
