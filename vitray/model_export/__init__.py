"""`vitray export MODEL`: checkpoints in other formats and smaller, compared with the original
before they are written.

export.py   the order of an export, and the files it writes
graphs.py   the formats and their quantisers
"""
