"""How long a suite takes, before it starts: its jobs, what each has to do, and how fast that goes. Imports no torch."""
