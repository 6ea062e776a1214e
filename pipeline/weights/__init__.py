"""Advantages, credit and importance weights of units, as polars expressions."""
