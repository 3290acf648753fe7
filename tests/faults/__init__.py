"""What happens to runs, done to real processes."""
