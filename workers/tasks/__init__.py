"""Evaluation tasks. Each scores a language model given as `workers.tasks.base.Logits` and knows nothing of files of models."""
