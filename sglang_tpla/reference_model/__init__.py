"""DeepSeek's model in plain PyTorch, the reference that calibration and evaluation run."""
