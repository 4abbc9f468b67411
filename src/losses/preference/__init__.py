"""Losses on pairs of answers, a chosen and a rejected one."""
