"""Open-loop load against OpenAI-compatible endpoints: the work of `halfmoon bench serve`. Needs aiohttp and numpy, not torch or ray.

arrivals, lengths ─► synthetic_plan ┐
trace file ────────► trace_plan ────┴─► Plan ─► materialise ─► LoadRequest ─► run_window ─► Sample ─► summarise ─► tables, JSON, PNG
                                       (shape)   (tokens)                      (aiohttp)
"""
