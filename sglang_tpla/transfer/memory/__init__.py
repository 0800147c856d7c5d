"""Cache pools, rows, staging and shared memory, and the copies between them."""
