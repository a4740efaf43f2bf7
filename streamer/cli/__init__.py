"""Provide the command line: arguments, progress, tables, forecasts, the demo. Only this folder prints and exits."""
