"""The router inside frameworks that people already train and serve with; see docs/integrations."""
