"""Explanation methods: attention rollout, gradient rollout and attention flow."""
