"""Everything that touches SGLang's internals. No other folder imports ``sglang``."""
