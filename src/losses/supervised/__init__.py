"""Losses on given target tokens."""
