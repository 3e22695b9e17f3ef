"""Completions from SGLang servers."""
