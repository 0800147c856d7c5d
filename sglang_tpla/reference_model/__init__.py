"""DeepSeek's model in plain PyTorch: calibration and evaluation run this reference."""
