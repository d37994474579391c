"""The step machine of GPUs: its tables."""
