"""The CPU reference platform, with which SGLang serves without a GPU."""
