"""What people do with a dataset around a run: plan, estimate, validate, submit, relabel, compact
and so on.
"""
