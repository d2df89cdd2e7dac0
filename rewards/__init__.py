"""Rewards: plain functions from a completion's text to a number, and their weighted sum. Standard library only."""
