"""Forecast what a command needs, from headers and a short probe of this machine."""
