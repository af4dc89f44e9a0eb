"""MACs before anything runs: what a method costs, and the setting that costs as much as another."""
