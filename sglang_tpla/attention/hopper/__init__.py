"""Decode attention on Hopper GPUs (sm_90a): the plan, the launch, and the CUDA sources in cuda/."""
