"""How good a model's labels and vectors are, and how they compare with another model's.

metrics.py     accuracy, confusion, overlap and error: pure functions of arrays
pictures.py    small pictures of rows, read from the source again
agreement.py   an exported model beside its original: labels, vectors, speed
"""
