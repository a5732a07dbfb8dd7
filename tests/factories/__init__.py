"""Test data, made by functions: nothing here is a test, and nothing starts a server.

- `shards`: drawn shapes as tars, Parquet, loose files and manifests
- `hand_made`: whole datasets whose predictions are a formula
- `embedded`: datasets with the keys and vectors that a test gives
- `small_models`: small checkpoints of every family, and transformers' own results
- `digits`: scikit-learn's handwritten digits, and a model to train on them
"""
