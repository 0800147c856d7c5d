"""The TPLA decode backend inside SGLang's attention interface."""
