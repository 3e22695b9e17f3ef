"""Advantages, losses, KL estimators and their aggregation."""
