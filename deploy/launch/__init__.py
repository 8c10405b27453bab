"""A cluster on hosts of its own, by `ray up`: what `halfmoon deploy` writes, checks and runs.

description ─► ray_yaml ─► folder (ray.yaml, halfmoon.yaml, auth_token) ─► launcher ─► ssh ─► head, on the head host ─► halfmoon serve
"""
