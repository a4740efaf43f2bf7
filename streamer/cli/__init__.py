"""Commands: arguments, progress, tables, forecasts, the demo. The only place that prints and exits."""
