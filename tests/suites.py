"""Suites and configs that differ in some fields, named as `samples.count`."""

import copy
from collections.abc import Mapping
from typing import Any

from tcbench.config.suite import Suite


def with_fields(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config's mapping with other values in some fields; `...` removes one."""
    config = copy.deepcopy(dict(config))
    for field, value in changes.items():
        *groups, last = field.split(".")
        inner = config
        for group in groups:
            inner = inner.setdefault(group, {})
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    return config


def altered(suite: Suite, changes: Mapping[str, Any]) -> Suite:
    """A suite with other values in some fields, unchecked."""
    for field, value in changes.items():
        group, _, inner = field.partition(".")
        if inner:
            value = getattr(suite, group).model_copy(update={inner: value})
        suite = suite.model_copy(update={group: value})
    return suite
