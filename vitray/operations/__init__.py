"""What users do around a run: plan, estimate, bench, validate, submit, relabel and compact."""
