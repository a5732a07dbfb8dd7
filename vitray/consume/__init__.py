"""What people do with the rows of a dataset: search, export, compare, report."""
