"""How long a step takes, learnt, and how much may stand in it. Pure: workers, Conductor and simulator use the same."""
