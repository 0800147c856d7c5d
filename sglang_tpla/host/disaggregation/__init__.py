"""SGLang's prefill/decode disaggregation over the transfer agents."""
