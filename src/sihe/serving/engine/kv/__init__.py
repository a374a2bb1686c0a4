"""The KV cache: which blocks hold what (`blocks`), and the tensors behind them (`storage`)."""
