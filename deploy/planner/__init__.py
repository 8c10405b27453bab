"""How many GPUs a load needs, and in which form: the simulator asked about each form.

trace ─► window ─┐
model, GPU ─► cost model ─► forms: coupled, splits, adaptive ─► simulator ─► the cheapest that holds the SLO with margin
                                                                            ─► table, picture, JSON
"""
