"""The router inside frameworks that people already train and serve with; each is off until its config turns it on."""
