"""starter: what every branch added to the stream is held between full steps.

Edit `plan`: docs/add-a-method.md has a table of what methods do, docs/how-it-works.md the words that a plan is made of.
"""

from pydantic import PositiveInt

from tcbench.method import Look, Method
from tcbench.plan import ALL, NONE, Plan, every_unit
from tcbench.schedule import spread_evenly


class Starter(Method):
    """Hold all branches on the steps between.

    Options:
        num_full_steps: how many steps compute everything, spread evenly.
    """

    name = "starter"
    label = "starter"
    knob = "num_full_steps"

    num_full_steps: PositiveInt = 8

    def plan(self, look: Look) -> Plan:
        """Who is computed at this step: everything (and stored), or nothing (and held)."""
        full = look.step in spread_evenly(self.num_full_steps, look.run.nfe)
        return every_unit(look.run.shape.sites, ALL if full else NONE)
