"""Advantages, losses, KL estimators and their aggregation.

Pure functions: numpy in float64 for what is computed once per response, torch tensors for what is computed once
per token. Tensors are handled by their methods only, so importing this package loads no torch.
"""
