"""Inspecting a network: its step explained, its gradients and devices compared, its training in pictures."""
