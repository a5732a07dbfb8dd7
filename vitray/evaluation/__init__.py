"""How good a model's labels and vectors are, and how they compare with another model's."""
