"""A small interatomic potential with `diffnl` inside it; `examples/train_mlip.py` trains it."""
