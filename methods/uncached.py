"""The model as it is, at every step: the reference that every other row is measured against."""

from tcbench.method import Look, Method
from tcbench.plan import Plan


class Uncached(Method):
    """Compute everything."""

    name = "uncached"
    label = "uncached"
    decides = "ahead"

    def plan(self, look: Look) -> Plan:
        """Nothing is cached."""
        return Plan()
