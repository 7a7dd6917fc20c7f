"""The arena of pruners and mergers: one model, observed once a seed, made smaller by each and measured.

It lies in this room and not beside the arena of routers, since it needs what measures a fit.
"""
