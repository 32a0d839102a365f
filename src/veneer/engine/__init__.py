"""How a model runs fast and small: kernels in place of modules, attention without padding, a head in chunks."""
