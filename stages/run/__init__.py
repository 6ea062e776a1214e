"""What every stage opens: the run's layout, its config and models, the terminal."""
