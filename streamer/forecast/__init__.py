"""Forecasts of what a command takes, from headers and a short probe of this machine."""
