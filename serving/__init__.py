"""Hosting an exported model over HTTP: Ray Serve in front, vLLM behind, the OpenAI protocol between.

Serving knows a run only by its manifest: of the training package it imports `paths`, `errors` and `session`, nothing
else.
"""
