"""Replicas of one version: where they run, which of them a request goes to, and how many there are."""
