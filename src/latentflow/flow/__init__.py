"""Flow matching as mathematics: paths, times, the loss, guidance and solvers, over tensors and functions of (x, t)."""
