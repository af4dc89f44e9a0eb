"""Checks every number of the paper that needs no weights; `tcbench.report.audit` renders the result.

The reported values are the paper's tables, `assets/paper/*.csv`, as printed. Derived values come from the ledger with
full-size models on the meta device, from formulas where the ledger has no adapter yet, and from the tables themselves.
"""
