"""`vitray export-model`: checkpoints in other formats, quantised if asked.

export.py   the steps of an export, its comparison with the original, and the files it writes
graphs.py   the formats and their quantisers
samples.py  images of a job's source, to calibrate with and to compare on
"""
