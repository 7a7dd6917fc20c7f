"""The arena of pruners: one model, observed once a seed, cut by every criterion and measured.

It lies in this room and not beside the arena of routers, since it needs what measures a fit.
"""
