"""Open-loop load against OpenAI-compatible endpoints: what `halfmoon bench serve` does. Needs aiohttp and numpy, neither torch nor ray.

arrivals, lengths ─► synthetic_plan ┐
trace file ────────► trace_plan ────┴─► Plan ─► materialise ─► LoadRequest ─► run_window ─► Sample ─► summarise ─► tables, JSON, PNG
                                       (shape)   (tokens)                      (aiohttp)
"""
