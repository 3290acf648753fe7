"""Training recipes: each folder holds the models, configs and entry point of one published method."""
