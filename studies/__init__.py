"""Studies: their settings (*.toml), results (results/*.csv), and what the documentation shows of them."""
