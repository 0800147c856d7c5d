"""The CPU reference platform: what SGLang needs to serve without a GPU."""
