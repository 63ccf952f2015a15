"""Rollouts from vLLM servers: their flags, HTTP, endpoints, weights, and the engine over them."""
