"""Samples for clients: their sessions, and what a request asks for."""
