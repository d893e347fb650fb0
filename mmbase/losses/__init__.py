"""Features to loss: gathers across ranks and calls mmbase_kernels."""
