"""SGLang's DeepSeek layers, model configuration and cache pools, as TPLA needs them."""
