"""Chaos: a fleet under steady load, faults inflicted on it, and a checker that knows every request and every block.

``make chaos`` runs it; ``docs/reliability.md`` says what it showed.
"""
