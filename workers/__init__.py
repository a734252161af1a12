"""Runs where the model is. Knows nothing of Hydra, Ray or MLflow."""
