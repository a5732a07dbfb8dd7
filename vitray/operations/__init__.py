"""What users do with a dataset around a run: plan, estimate, validate, submit, compact and so on."""
