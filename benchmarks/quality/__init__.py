"""The 3H benchmark: which merge balances helpful, honest and harmless experts best? `make quality` runs all of it."""
