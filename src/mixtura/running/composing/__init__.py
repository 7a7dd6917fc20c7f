"""Whole models as experts: tables of what they answered, routers fitted on them, measured and asked."""
